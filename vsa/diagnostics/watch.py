# SPDX-License-Identifier: Apache-2.0
"""``watch``: recall at every budget of a model's own layers while it runs."""

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
        q, k, grid = _queries_and_keys(layer, *args, **options)
        curves.note(name, q, k, grid=grid, step=calls[name])
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
def _queries_and_keys(
    layer: VideoSparseAttention, x: Tensor, grid: Any = None, *, rotary: Any = None, **_: Any
) -> tuple[Tensor, Tensor, Any]:
    """What a layer's forward is about to attend with: flat q and k, and their grid."""
    q, k, *_others = layer.projections(x)
    if rotary is not None:
        q, k = rotary(q, k)
    call = inputs.resolve(q, k, k, grid=grid, tile=layer.tile)
    return call.q, call.k, call.grid
