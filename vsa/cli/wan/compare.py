# SPDX-License-Identifier: Apache-2.0
"""Dense and sparse runs of one video in ``vsa wan``, side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from vsa.cli.wan.attention import dense_kernels, preferring
from vsa.cli.wan.loop import Denoiser, Run, run
from vsa.cli.wan.model import Size
from vsa.cli.wan.parts import ATTENTION, PARTS, STEP
from vsa.cli.wan.ranks import Team
from vsa.integrations.diffusers import apply_vsa, collect, load_gates, remove_vsa
from vsa.measure import stage_hooks
from vsa.measure.timing import spread
from vsa.values import checks
from vsa.values.grid import Grid

Gates = dict[str, Tensor]
"""Weights of coarse gates, by ``blocks.N.to_gate_compress.weight`` and ``.bias``."""
PARTS_CAPTION = (
    "Parts are of one more step, under a profiler, which slows it: shares are of its time."
)
REPORTED_STEPS = 10
"""About how many steps go into a report."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """Dense and sparse runs of one size from the same noise.

    Attributes:
        size: of the video.
        grid: its tokens, tiled as the sparse run tiles them.
        kept: key tiles per query tile.
        dense: the dense run.
        sparse: the sparse run.
        kernels: seconds of each dense kernel for one layer, that of the runs first; empty where
            PyTorch offers no choice.
        native: the sparse run in native precision, where ``sparse`` has another one.
    """

    size: Size
    grid: Grid
    kept: int
    dense: Run
    sparse: Run
    kernels: dict[str, float]
    native: Run | None = None

    @property
    def difference(self) -> float:
        """Distance of the results as a share of the dense one's norm."""
        return _distance(self.sparse, self.dense)

    @property
    def of_precision(self) -> float | None:
        """Distance of the sparse results as a share of the native one's norm."""
        return None if self.native is None else _distance(self.sparse, self.native)

    @property
    def runs(self) -> dict[str, Run]:
        """All of them by name, as they ran."""
        sparse = {"sparse": self.sparse}
        if self.native is not None:
            sparse = {"sparse, native": self.native, "sparse, low precision": self.sparse}
        return {"dense": self.dense, **sparse}


def compare(
    denoiser: Denoiser,
    size: Size,
    settings: dict[str, Any],
    gates: Gates,
    told: Callable[[str], None],
    team: Team | None = None,
) -> Comparison:
    """Run both.

    Args:
        denoiser: of this size; its transformer is dense before and after.
        size: of the video.
        settings: arguments of ``apply_vsa``.
        gates: what its gates are, where the settings have any.
        told: is told which run it was after every step.
        team: the processes that share out the video; None for this one alone.
    """
    transformer: Any = denoiser.transformer
    # PyTorch compiles a block a limited number of times, twice for every size.
    torch.compiler.reset()
    grid = Grid(size.grid, tile=settings["tile"])
    config = transformer.config
    kernels = dense_kernels(
        grid.tokens,
        config.num_attention_heads // (1 if team is None else team.count),
        config.attention_head_dim,
        denoiser.noise.device,
        denoiser.text.dtype,
    )
    if team is not None:
        kernels = team.choice_of_the_first(kernels)
    # every kind of step: dense, one that chooses tiles, one that takes them again
    kinds = settings["dense_steps"] + 1 + (settings["refresh_every"] > 1)
    with preferring(kernels):
        dense, native = run(denoiser, 1, lambda: told("dense")), None
        warm_up = min(kinds, denoiser.steps)
        if settings.get("precision", "native") != "native":
            make_sparse(transformer, settings | {"precision": "native"}, gates)
            native = run(denoiser, warm_up, lambda: told("sparse, native"))
        make_sparse(transformer, settings, gates)
        sparse = run(denoiser, warm_up, lambda: told("sparse"))
        remove_vsa(transformer)
    kept = checks.top_k(settings["topk"], grid.num_tiles)
    return Comparison(size, grid, kept, dense, sparse, kernels, native)


@torch.no_grad()
def observe(
    denoiser: Denoiser,
    settings: dict[str, Any],
    gates: Gates,
    each: Callable[[], object],
    path: Path,
) -> None:
    """Run the sparse loop once more, untimed, and write what it kept.

    Args:
        denoiser: of the noise that the timed runs began with.
        settings: arguments of ``apply_vsa``.
        gates: of the coarse branch by layer; empty for none.
        each: is called after every step.
        path: of the report, .html or .png.
    """
    transformer = denoiser.transformer
    make_sparse(transformer, settings, gates)
    with collect(transformer, every=max(1, denoiser.steps // REPORTED_STEPS)) as record:
        denoiser.denoise(each)
    remove_vsa(transformer)
    record.report(path)


def make_sparse(transformer: nn.Module, settings: dict[str, Any], gates: Gates) -> None:
    """Apply the settings, and load the gates if there are any.

    Raises:
        ValueError: gates that are not those of this transformer's layers.
    """
    apply_vsa(transformer, **settings)
    if gates:
        load_gates(transformer, gates)


def table(found: Comparison, transformer: nn.Module, compiled: bool) -> Table:
    """Times, shares and memory of one comparison.

    Args:
        found: the comparison.
        transformer: what ran.
        compiled: whether its steps ran compiled, whose parts then say nothing about them.
    """
    config: Any = transformer.config
    result = Table(
        f"{found.size}",
        title=f"{found.grid.tokens:,} tokens, {config.num_layers} layers, "
        f"{config.num_attention_heads} heads of {config.attention_head_dim}; "
        f"{found.kept} of {found.grid.num_tiles} tiles of "
        f"{'x'.join(map(str, found.grid.box))} kept ({found.kept / found.grid.num_tiles:.1%})",
        title_justify="left",
        caption_justify="left",
    )
    runs = list(found.runs.values())
    for column in (*found.runs, "gain"):
        result.add_column(column, justify="right")
    medians = [statistics.median(one.steps) for one in runs]
    result.add_row(
        "[bold]a step[/bold], median",
        *(
            f"{_time(median)} ±{spread(one.steps):.0%}"
            for median, one in zip(medians, runs, strict=True)
        ),
        _gains(medians),
    )
    attention = [one.stages[ATTENTION] for one in runs]
    wholes = medians
    if not compiled:  # a compiled step has no parts to time, so its own time is all there is
        wholes = [one.stages[STEP] for one in runs]
        result.add_row("one more step, in parts", *map(_time, wholes), _gains(wholes))
    result.add_row(
        "  self-attention",
        *(
            f"{_time(part)} ({part / whole:.0%})"
            for part, whole in zip(attention, wholes, strict=True)
        ),
        _gains(attention),
    )
    for stage in stage_hooks.FORWARD:
        if stage in found.sparse.stages:
            times = (_time(one.stages[stage]) if stage in one.stages else "" for one in runs)
            result.add_row(f"    {stage}", *times, "")
    rest = [whole - part for part, whole in zip(attention, wholes, strict=True)]
    result.add_row("  everything else", *map(_time, rest), "")
    if not compiled:
        for part in PARTS:
            result.add_row(f"    {part}", *(_time(one.stages[part]) for one in runs), "")
        result.add_row(
            "    rotation, modulation, sums", *(_time(remainder(one)) for one in runs), ""
        )
        result.caption = PARTS_CAPTION
    totals = [one.total for one in runs]
    count = len(found.dense.steps)
    result.add_row(f"[bold]{count} steps[/bold], end to end", *map(_time, totals), _gains(totals))
    result.add_row("warm-up before", *(_time(one.warm_up) for one in runs), "")
    result.add_row("peak memory beyond the weights", *(in_bytes(one.memory) for one in runs), "")
    return result


def remainder(one: Run) -> float:
    """Seconds of a step taken apart that are in none of its parts."""
    return one.stages[STEP] - one.stages[ATTENTION] - sum(one.stages[part] for part in PARTS)


def figures(found: Comparison) -> dict[str, Any]:
    """The same numbers and all single steps, in ms and bytes: a row of a JSON file."""

    def of_run(one: Run) -> dict[str, Any]:
        return {
            "warm_up_ms": one.warm_up * 1e3,
            "steps_ms": [step * 1e3 for step in one.steps],
            "step_ms": statistics.median(one.steps) * 1e3,
            "total_ms": one.total * 1e3,
            "memory": one.memory,
            "stages_ms": {name: seconds * 1e3 for name, seconds in one.stages.items()},
        }

    return {
        "size": str(found.size),
        "grid": found.grid.shape,
        "tile": found.grid.box,
        "kept": found.kept,
        "tiles": found.grid.num_tiles,
        "dense": of_run(found.dense),
        "sparse": of_run(found.sparse),
        "native": None if found.native is None else of_run(found.native),
        "dense_kernels_ms": {name: seconds * 1e3 for name, seconds in found.kernels.items()},
        "difference": found.difference,
        "difference_to_native": found.of_precision,
    }


def kernel_line(found: Comparison) -> str:
    """Which dense kernel was taken, and what the others would have been."""
    if not found.kernels:
        return "dense attention: PyTorch's scaled_dot_product_attention"
    times = [f"{name} {_time(seconds)}" for name, seconds in found.kernels.items()]
    others = f", against {', '.join(times[1:])}" if times[1:] else ""
    return f"dense attention at {found.size}: {times[0]} a layer{others}"


def in_bytes(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def _gains(times: list[float]) -> str:
    """Of the last run over the dense one, and over the native one where there are three."""
    dense, *native, last = times
    beside = "".join(f"\n{other / last:.2f}x native" for other in native)
    return f"[bold]{dense / last:.2f}x[/bold]{beside}"


def _distance(one: Run, other: Run) -> float:
    return float((one.video - other.video).norm() / other.video.norm())


def _time(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1e3:,.1f} ms"
