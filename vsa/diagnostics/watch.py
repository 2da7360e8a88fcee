# SPDX-License-Identifier: Apache-2.0
"""``watch``: recall and output error at every budget of a model's layers while it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vsa.diagnostics.curves import SAMPLED_TILES, Curves, Order
from vsa.nn import VideoSparseAttention
from vsa.stages import inputs
from vsa.values.budgets import attention_layers


@contextmanager
def watch(
    model: nn.Module, *, tiles: int = SAMPLED_TILES, score: Order = "mean"
) -> Iterator[Curves]:
    """Note what the heads of every ``vsa.nn.VideoSparseAttention`` keep while the model runs.

    Projections are computed once more for it, and dense attention for a few query tiles. A layer's
    first call is step 0, its second call step 1. What is compiled runs uncompiled meanwhile.

    Args:
        model: that holds the layers.
        tiles: query tiles that are measured, spread over the video.
        score: what tiles are ordered by, as in ``vsa.attention``.

    Yields:
        The curves, which fill while the model runs; ``vsa.calibrate`` takes them.

    Raises:
        ValueError: a model without such a layer, or a number that is not allowed.
    """
    layers = attention_layers(model)
    curves = Curves(list(layers), tiles=tiles, score=score)
    calls: Counter[str] = Counter()

    def note(name: str, layer: VideoSparseAttention, args: Any, options: dict[str, Any]) -> None:
        call, gate = _about_to_attend(layer, *args, **options)
        curves.note(
            name,
            call.q,
            call.k,
            call.v,
            grid=call.grid,
            step=calls[name],
            gate_fine=gate,
            text_valid=call.text_valid,
        )
        calls[name] += 1

    handles = [
        layer.register_forward_pre_hook(partial(note, name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield curves
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _about_to_attend(
    layer: VideoSparseAttention,
    x: Tensor,
    grid: Any = None,
    *,
    rotary: Any = None,
    text_valid: Tensor | None = None,
    **_: Any,
) -> tuple[inputs.Inputs, Tensor | None]:
    """What a layer's forward is about to attend with, and its fine gate, flat."""
    q, k, v, _coarse, gate = layer.projections(x)
    if rotary is not None:
        q, k = rotary(q, k)
    call = inputs.resolve(q, k, v, grid=grid, tile=layer.tile, text_valid=text_valid)
    if gate is not None and gate.ndim == 6:
        gate = gate.flatten(1, 3)
    return call, gate
