# SPDX-License-Identifier: Apache-2.0
"""``collect``: a record of what a sparse transformer keeps while a pipeline runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from vsa.diagnostics.curves import SAMPLED_TILES, Curves, Order
from vsa.diagnostics.precision import PrecisionErrors
from vsa.diagnostics.record import Record
from vsa.integrations.diffusers.compiled import uncompiled
from vsa.integrations.diffusers.plan import PLAN, Plan
from vsa.values.precision import Precision


@contextmanager
def collect(
    transformer: nn.Module,
    *,
    every: int = 1,
    tiles: int = SAMPLED_TILES,
    maps: Sequence[int] | None = None,
    curves: bool = False,
    score: Order = "mean",
    precisions: Sequence[Precision] = (),
) -> Iterator[Record]:
    """Note recall, density and tile maps of every sparse layer while the transformer runs.

    In a step that is noted, every layer computes dense attention for a few query tiles. The first
    call of a step counts (with guidance there are several), and of several videos the last.
    Compiled blocks run uncompiled meanwhile.

    Args:
        transformer: one on which ``apply_vsa`` has been called.
        every: steps between two that are noted.
        tiles: query tiles, spread over the video, that recall is measured for.
        maps: layers whose tile maps are kept; None for the first, the middle and the last.
        curves: also note recall and output error at every budget, which ``vsa.calibrate`` goes by.
        score: what tiles are ordered by in them, as in ``vsa.attention``.
        precisions: also note what these change, of "int8" and "fp8", as ``record.precision``:
            simulated, for bf16 and fp16 (``vsa.diagnostics.PrecisionErrors``).

    Yields:
        The record, which fills while the transformer runs.

    Raises:
        ValueError: a transformer without ``apply_vsa``, one that is being recorded already, or a
            number that is not allowed.
    """
    module: Any = getattr(transformer, "_orig_mod", transformer)
    plan: Plan | None = getattr(module, PLAN, None)
    if plan is None:
        raise ValueError(
            "transformer has no sparse layers to record: call apply_vsa(transformer, topk=...) "
            "first"
        )
    if plan.record is not None:
        raise ValueError(
            "transformer is being recorded already: leave the other collect(...) block first"
        )
    count = len(plan.layers)
    chosen = sorted({0, count // 2, count - 1}) if maps is None else maps
    noted = Curves(list(plan.layers), tiles=tiles, score=score) if curves else None
    errors = None
    if precisions:
        errors = PrecisionErrors(list(plan.layers), precisions=precisions, tiles=tiles)
    plan.record = record = Record(count, every, tiles, chosen, noted, errors)
    try:
        with uncompiled(module):
            yield record
    finally:
        plan.record = None
