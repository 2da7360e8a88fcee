# SPDX-License-Identifier: Apache-2.0
"""``calibrate``: budgets per layer and head, at equal total cost, for recall or output error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from vsa.diagnostics.curves import SAMPLED_TILES, Curves, Order
from vsa.diagnostics.watch import watch
from vsa.diagnostics.water_filling import fill_for_error, fill_for_mean, water_fill
from vsa.schedule import StepSchedule
from vsa.values import checks
from vsa.values.budget import LayerBudget
from vsa.values.budgets import Budgets
from vsa.values.grid import Extent

if TYPE_CHECKING:
    from vsa.diagnostics.record import Record

FILL = {"worst": water_fill, "mean": fill_for_mean, "error": fill_for_error}
"""How tiles are shared out, by what is aimed at."""
ERROR = "error"
"""The aim that goes by errors of the output, not by recall."""


def calibrate(
    source: nn.Module | Record | Curves,
    topk: float | StepSchedule = 0.1,
    *,
    run: Callable[[], object] | None = None,
    aim: Literal["worst", "mean", "error"] = "worst",
    per_step: bool = False,
    least: float = 1,
    tiles: int = SAMPLED_TILES,
    score: Order = "mean",
) -> Budgets | StepSchedule:
    """Budgets per layer and head at the cost of a uniform ``topk``, by recall or by output error.

    For every head it is measured what its best tiles keep, at every number of tiles at once. Then
    as many tiles as ``topk`` would give to all heads together are shared out:

    - ``aim="worst"`` makes the lowest recall (share of dense attention on the kept tiles) as high
      as it can be: sharp heads need few, diffuse heads get more. The mean may fall.
    - ``aim="mean"`` makes the mean recall as high as it can be.
    - ``aim="error"`` makes the attention output of every layer as near to dense attention as its
      share of the tiles allows. With n tiles a head puts out softmax attention over its first n
      tiles (and the text), out_n, where dense attention puts out out. Minimised is sum_h |out_n -
      out|^2 over the heads of a layer, behind the fine gate where there is one, so no layer's
      error is larger than with as many tiles for every head (on the clips that were noted). A head
      whose attention is spread and hardly moves the output takes no tiles from heads that do.
      Tiles go from head to head of a layer and step, never from layer to layer: relative errors,
      the only ones that need no knowledge of what follows, are largest where attention is spread
      over whole layers, and would starve the others as "worst" does. Neither the output projection
      nor a tail is looked at. The objective is this project's own.

    Warning: budgets calibrated for recall made models worse. In two models of ``vsa train --size
    25m`` at 12.5 % of the tiles (H200, commit e5c1923, bench/TABLES.md) held-out loss was, with as
    many tiles for every head, for the worst head and for the mean: 0.1262, 0.2102 and 0.1366 in the
    one trained dense, 0.1247, 0.1792 and 0.1266 in the one trained with VSA. With
    ``aim="error"`` a dense one of ``--size 10m`` had 0.3584 where as many tiles for every head gave
    0.3590: no harm, and next to no gain. Measure yours before you trust any.

    Args:
        source: a model with ``vsa.nn.VideoSparseAttention`` layers, or a transformer under
            ``apply_vsa``, with ``run``; or what was noted before: ``vsa.diagnostics.Curves``, for
            "error" with values, or the record of ``collect(transformer, curves=True)``.
        topk: tiles of each head on average, a number or a share of the tiles. A ``StepSchedule`` of
            these calibrates each of its parts by the steps that were noted in it, and leaves None
            dense.
        run: runs the model a few times, without arguments: a few denoising steps of a typical
            video. With ``apply_vsa(topk=1.0)`` beforehand attention is dense while it is measured.
        aim: "worst" for the highest recall of the worst head, "mean" for the highest mean recall of
            all heads, "error" for the least error of every layer's output.
        per_step: budgets of their own for every step that was noted, at the same total over these
            steps ("error": in each of them); each holds until the next.
        least: tiles that every head keeps, a number or a share of the tiles.
        tiles: query tiles that are measured, spread over the video. Each costs its share of dense
            attention twice over, and for output errors a scan over (64, n, head_dim) partial
            outputs; memory is bounded by slices of 256 MiB, or one query tile.
        score: what tiles are ordered by, as in ``vsa.attention``.

    Returns:
        ``Budgets``; with ``per_step`` or a schedule, a ``StepSchedule`` of them. ``apply_vsa``
        takes either as ``topk``; ``Budgets.apply_to`` gives one to a model's own layers.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    if aim not in FILL:
        raise ValueError(f'aim must be "worst", "mean" or "error", but it is {aim!r}')
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
        return _shared_out(curves, {0: _measured(curves, layers)}, topk, low, aim)[0]
    measured = {step: _measured(curves, layers, [step]) for step in curves.steps}
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
        measured = {0: _measured(curves, curves.noted(), steps)}
        found[start] = _shared_out(curves, measured, topk, least, aim)[0]
    return StepSchedule(found)


class _Layer(NamedTuple):
    """What a layer's heads keep with 1 to n tiles, (heads, n).

    Attributes:
        recall: share of dense attention.
        error: squared, over the square of the layer's output; None where it is not known.
    """

    recall: Tensor
    error: Tensor | None


def _measured(
    curves: Curves, layers: Sequence[str], steps: Sequence[int] | None = None
) -> dict[str, _Layer]:
    """All layers in some steps; errors as far as values were noted."""
    return {
        layer: _Layer(
            curves.of(layer, steps),
            curves.error_of(layer, steps) if curves.has_errors(layer, steps) else None,
        )
        for layer in layers
    }


def _shared_out(
    curves: Curves,
    measured: Mapping[int, Mapping[str, _Layer]],
    topk: float,
    least: int,
    aim: str,
) -> dict[int, Budgets]:
    """Budgets of some steps, which share one total.

    Args:
        curves: whose grid and score are written down.
        measured: by step and layer.
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
    each = [
        _aimed_at(curves, *item, aim) for layers in measured.values() for item in layers.items()
    ]
    if aim == ERROR:  # layers keep their totals: see calibrate
        given = iter([_least_error(rows, count, least) for rows in each])
    else:
        rows = torch.cat(each)
        given = iter(FILL[aim](rows, count * len(rows), least).split(list(map(len, each))))
    found = {}
    for step, layers in measured.items():
        counts = {name: next(given) for name in layers}
        even = {name: torch.full_like(own, count) for name, own in counts.items()}
        recalls = {name: layer.recall for name, layer in layers.items()}
        errors = {name: layer.error for name, layer in layers.items() if layer.error is not None}
        known = len(errors) == len(layers)
        found[step] = Budgets(
            {name: LayerBudget(tuple(own.tolist()), n) for name, own in counts.items()},
            recall=_at(recalls, counts),
            recall_uniform=_at(recalls, even),
            error=_at(errors, counts) if known else None,
            error_uniform=_at(errors, even) if known else None,
            aim=aim,
            grid=curves.grid.shape,
            tile=cast("Extent", curves.grid.tile),
            score=str(curves.score),
        )
    return found


def _aimed_at(curves: Curves, name: str, layer: _Layer, aim: str) -> Tensor:
    """The curves (heads, n) that tiles of a layer are shared out by."""
    if aim != ERROR:
        return layer.recall
    return curves.error_of(name) if layer.error is None else layer.error  # or it says what lacks


def _least_error(rows: Tensor, count: int, least: int) -> Tensor:
    """Tiles of a layer's heads, (heads,): even shares where none are found that are better.

    What is found is the best there is for small totals; for large ones it is so nearly.
    """
    found = FILL[ERROR](rows, count * len(rows), least)
    even = torch.full_like(found, count)
    return min(found, even, key=lambda counts: float(rows.gather(1, counts[:, None] - 1).sum()))


def _at(layers: Mapping[str, Tensor], counts: Mapping[str, Tensor]) -> dict[str, tuple[float, ...]]:
    """What every head keeps with its own number of tiles."""
    return {
        name: tuple(curves.gather(1, counts[name][:, None] - 1)[:, 0].tolist())
        for name, curves in layers.items()
    }
