# SPDX-License-Identifier: Apache-2.0
"""``calibrate``: budgets per layer and head, at equal total cost, for the recall of heads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from vsa.diagnostics.curves import SAMPLED_TILES, Curves, Order
from vsa.diagnostics.watch import watch
from vsa.diagnostics.water_filling import fill_for_mean, water_fill
from vsa.schedule import StepSchedule
from vsa.values import checks
from vsa.values.budget import LayerBudget
from vsa.values.budgets import Budgets
from vsa.values.grid import Extent

if TYPE_CHECKING:
    from vsa.diagnostics.record import Record

FILL = {"worst": water_fill, "mean": fill_for_mean}
"""How tiles are shared out, by what is aimed at."""


def calibrate(
    source: nn.Module | Record | Curves,
    topk: float | StepSchedule = 0.1,
    *,
    run: Callable[[], object] | None = None,
    aim: Literal["worst", "mean"] = "worst",
    per_step: bool = False,
    least: float = 1,
    tiles: int = SAMPLED_TILES,
    score: Order = "mean",
) -> Budgets | StepSchedule:
    """Budgets per layer and head that maximise the recall of the worst head, or the mean.

    For every head it is measured what share of dense attention its best tiles hold, at every number
    of tiles. Then as many tiles as ``topk`` would give to all heads together are shared out, so
    that the lowest recall is as high as it can be: sharp heads need few, diffuse heads get more.
    The cost of a step stays what ``topk`` costs. The mean recall may fall where one head needs
    much; ``print`` the result and look. ``aim="mean"`` raises the mean instead, and may leave the
    worst head with less.

    Args:
        source: a model with ``vsa.nn.VideoSparseAttention`` layers, or a transformer under
            ``apply_vsa``, with ``run``; or what was noted before: ``vsa.diagnostics.Curves``, or
            the record of ``collect(transformer, curves=True)``.
        topk: tiles of each head on average, a number or a share of the tiles. A ``StepSchedule`` of
            these calibrates each of its parts by the steps that were noted in it, and leaves None
            dense.
        run: runs the model a few times, without arguments: a few denoising steps of a typical
            video. With ``apply_vsa(topk=1.0)`` beforehand attention is dense while it is measured.
        aim: "worst" for the highest recall of the worst head, "mean" for the highest mean recall of
            all heads.
        per_step: budgets of their own for every step that was noted, at the same total over these
            steps; each holds until the next.
        least: tiles that every head keeps, a number or a share of the tiles.
        tiles: query tiles that are measured, spread over the video.
        score: what tiles are ordered by, as in ``vsa.attention``.

    Returns:
        ``Budgets``; with ``per_step`` or a schedule, a ``StepSchedule`` of them. ``apply_vsa``
        takes either as ``topk``; ``Budgets.apply_to`` gives one to a model's own layers.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    if aim not in FILL:
        raise ValueError(f'aim must be "worst" or "mean", but it is {aim!r}')
    if per_step and isinstance(topk, StepSchedule):
        raise ValueError("per_step must be False where topk is a StepSchedule, which has the steps")
    if not isinstance(topk, StepSchedule):
        checks.top_k(topk, 1)
    checks.top_k(least, 1, "least")
    curves = _curves_of(source, run, tiles, score)
    if curves.grid is None:
        raise ValueError(
            "source has noted nothing: run the model inside, in steps and layers that are sparse "
            "(topk=1.0 counts as sparse and computes dense attention)"
        )
    layers, n = curves.noted(), curves.grid.num_tiles
    low = checks.top_k(least, n)
    if isinstance(topk, StepSchedule):
        return _by_schedule(curves, topk, low, aim)
    if not per_step:
        measured = {0: {layer: curves.of(layer) for layer in layers}}
        return _shared_out(curves, measured, topk, low, aim)[0]
    measured = {
        step: {layer: curves.of(layer, [step]) for layer in layers} for step in curves.steps
    }
    found = _shared_out(curves, measured, topk, low, aim)
    return StepSchedule({0 if step == min(found) else step: each for step, each in found.items()})


def _curves_of(
    source: object, run: Callable[[], object] | None, tiles: int, score: Order
) -> Curves:
    """What was noted, or what is noted now."""
    from vsa.diagnostics.record import Record  # it loads the compiler, which import vsa does not

    if isinstance(source, (Curves, Record)):
        if run is not None:
            raise ValueError("run must be None where source was recorded before")
        found = source if isinstance(source, Curves) else source.curves
        if found is None:
            raise ValueError(
                "source is a record without curves: make it by collect(transformer, curves=True)"
            )
        return found
    if not isinstance(source, nn.Module):
        raise TypeError(
            "source must be a model, a record of collect or vsa.diagnostics.Curves, but it is of "
            f"type {type(source).__name__}"
        )
    if not callable(run):
        raise TypeError(
            f"run must be a function that runs the model a few times, but it is {run!r:.40}"
        )
    if _is_diffusers(source):
        from vsa.integrations.diffusers import collect

        with collect(source, tiles=tiles, maps=(), curves=True, score=score) as record:
            run()
        assert record.curves is not None
        return record.curves
    with watch(source, tiles=tiles, score=score) as curves:
        run()
    return curves


def _is_diffusers(model: nn.Module) -> bool:
    """Whether ``apply_vsa`` has been called on it; then diffusers has been imported."""
    if "vsa.integrations.diffusers" not in sys.modules:
        return False
    from vsa.integrations.diffusers.plan import PLAN

    return hasattr(getattr(model, "_orig_mod", model), PLAN)


def _by_schedule(curves: Curves, schedule: StepSchedule, least: int, aim: str) -> StepSchedule:
    """Each part of a schedule by what was noted in its steps."""
    starts = list(schedule.steps)
    found: dict[int, Any] = {}
    for start, end in zip(starts, [*starts[1:], None], strict=True):
        topk = schedule.steps[start]
        if topk is None:
            found[start] = None
            continue
        if isinstance(topk, bool) or not isinstance(topk, (int, float)):
            raise TypeError(
                f"topk must be a schedule of numbers, shares and None, but from step {start} on it "
                f"is {topk!r:.60}"
            )
        steps = [step for step in curves.steps if start <= step and (end is None or step < end)]
        if not steps:
            raise ValueError(
                f"source must have noted a step from {start} on for that part of the schedule, but "
                f"it has noted the steps {curves.steps}"
            )
        measured = {0: {layer: curves.of(layer, steps) for layer in curves.noted()}}
        found[start] = _shared_out(curves, measured, topk, least, aim)[0]
    return StepSchedule(found)


def _shared_out(
    curves: Curves,
    measured: Mapping[int, Mapping[str, Tensor]],
    topk: float,
    least: int,
    aim: str,
) -> dict[int, Budgets]:
    """Budgets of some steps, which share one total.

    Args:
        curves: whose grid and score are written down.
        measured: recall (heads, n) by step and layer.
        topk: tiles of each head on average.
        least: of each head.
        aim: a key of ``FILL``.
    """
    assert curves.grid is not None
    n = curves.grid.num_tiles
    count = checks.top_k(topk, n)
    if count < least:
        raise ValueError(
            f"least must not exceed topk, but it is {least} tiles and topk is {count} of {n}"
        )
    rows = torch.cat([each for layers in measured.values() for each in layers.values()])
    shares = FILL[aim](rows, count * len(rows), least).split(
        [len(each) for layers in measured.values() for each in layers.values()]
    )
    given = iter(shares)
    found = {}
    for step, layers in measured.items():
        counts = {name: next(given) for name in layers}
        found[step] = Budgets(
            {name: LayerBudget(tuple(each.tolist()), n) for name, each in counts.items()},
            recall={name: _at(layers[name], each) for name, each in counts.items()},
            recall_uniform={
                name: tuple(layer[:, count - 1].tolist()) for name, layer in layers.items()
            },
            grid=curves.grid.shape,
            tile=cast("Extent", curves.grid.tile),
            score=str(curves.score),
        )
    return found


def _at(curves: Tensor, counts: Tensor) -> tuple[float, ...]:
    """Recall of every head with its own number of tiles."""
    return tuple(curves.gather(1, counts[:, None] - 1)[:, 0].tolist())
