# SPDX-License-Identifier: Apache-2.0
"""What a model's layers keep and lose while it runs: recall, output errors, low precision."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vsa.diagnostics.curves import SAMPLED_TILES, Curves, Order
from vsa.diagnostics.precision import FASTEST, PrecisionErrors
from vsa.functional import select
from vsa.nn import VideoSparseAttention
from vsa.stages import inputs
from vsa.values.budgets import attention_layers
from vsa.values.precision import Precision


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

    def note(name: str, step: int, layer: VideoSparseAttention, *args: Any, **options: Any) -> None:
        call, gate = _about_to_attend(layer, *args, **options)
        curves.note(
            name,
            call.q,
            call.k,
            call.v,
            grid=call.grid,
            step=step,
            gate_fine=gate,
            text_valid=call.text_valid,
        )

    with _told(layers, note):
        yield curves


@contextmanager
def watch_precision(
    model: nn.Module,
    *,
    precisions: Sequence[Precision] = FASTEST,
    tiles: int = SAMPLED_TILES,
    backend: str = "torch",
) -> Iterator[PrecisionErrors]:
    """Note what low precision changes in every ``vsa.nn.VideoSparseAttention`` of a running model.

    The model itself computes as it is. Projections and the choice of tiles are computed once more,
    and attention for a few query tiles. A layer's first call is step 0, its second call step 1.
    What is compiled runs uncompiled meanwhile.

    Args:
        model: that holds the layers; it runs in bf16 or fp16, or under autocast to one of them.
        precisions: which are measured, of "int8" and "fp8".
        tiles: query tiles that are measured, spread over the video.
        backend: as in ``PrecisionErrors``.

    Yields:
        The errors, which fill while the model runs; ``choose`` makes a precision of each layer.

    Raises:
        ValueError: a model without such a layer, or a number that is not allowed.
    """
    layers = attention_layers(model)
    errors = PrecisionErrors(list(layers), precisions=precisions, tiles=tiles, backend=backend)

    def note(name: str, step: int, layer: VideoSparseAttention, *args: Any, **options: Any) -> None:
        call, _ = _about_to_attend(layer, *args, **options)
        chosen = options.get("selection")
        if chosen is None:
            chosen = select(call.q, call.k, layer.topk, grid=call.grid, score=layer.score)
        errors.note(name, call.q, call.k, call.v, selection=chosen, step=step)

    with _told(layers, note):
        yield errors


@contextmanager
def _told(layers: Mapping[str, VideoSparseAttention], note: Callable[..., None]) -> Iterator[None]:
    """``note(name, step, layer, *args, **options)`` before every call of a layer."""
    calls: Counter[str] = Counter()

    def before(name: str, layer: VideoSparseAttention, args: Any, options: dict[str, Any]) -> None:
        note(name, calls[name], layer, *args, **options)
        calls[name] += 1

    handles = [
        layer.register_forward_pre_hook(partial(before, name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
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
