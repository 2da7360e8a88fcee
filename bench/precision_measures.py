# SPDX-License-Identifier: Apache-2.0
"""What bench/precision.py measures: errors of heads, and what they come to in a whole model.

    error   |out - exact| / |exact| of a head; exact in fp64 of the same q, k, v and tiles
    worst   the largest of a query tile of a head
    lse     largest difference of a log-sum-exp

    loss    held-out loss of the model with all layers in that precision
    sample  |x - x_native| / |x_native| of what a denoising loop ends with, and after every step

A loop takes Euler steps from noise (time 1) to video (time 0): x = x - step * velocity.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

import vsa
from recall_measures import dense_attention
from recall_sources import Layer, Source, Trained
from vsa.diagnostics import watch_precision
from vsa.training import flow
from vsa.training.model import TOKEN_NUMBERS, VideoTransformer
from vsa.values.precision import DTYPES, PRECISIONS, Precision

SPARSITY = "sparsity"
"""Beside the precisions: what leaving tiles out changes, in fp64, against dense attention."""
EXACT, DENSE, CHOSEN = "native in fp32", "dense", "chosen"
"""Beside the precisions of a model: without 16 bits, with every tile, and layer by layer."""


class Errors(NamedTuple):
    """Of a layer in one precision, the mean over clips; the largest where it says so.

    Attributes:
        error: (heads,) fp64 on the CPU.
        worst: likewise, the largest of all clips.
        lse: likewise, the largest of all clips.
    """

    error: Tensor
    worst: Tensor
    lse: Tensor


class Loop(NamedTuple):
    """A model run in one way.

    Attributes:
        precision: of each layer.
        loss: held-out, (clips,).
        videos: after every step, (steps, clips, S, 48) fp32 on the CPU.
    """

    precision: tuple[Precision, ...]
    loss: Tensor
    videos: Tensor


@torch.no_grad()
def of_layers(source: Source, topk: float, backend: str) -> dict[str, dict[str, Errors]]:
    """Errors by layer, and then by precision or ``SPARSITY``, on the held-out clips."""
    sums: dict[tuple[str, str], list[Errors]] = defaultdict(list)
    for clip in source.held_out:
        for name, layer in clip.items():
            for what, found in _errors(layer, source.grid, topk, backend).items():
                sums[name, what].append(found)
    layers: dict[str, dict[str, Errors]] = defaultdict(dict)
    for (name, what), each in sums.items():
        error, worst, lse = (torch.stack(x) for x in zip(*each, strict=True))
        layers[name][what] = Errors(error.mean(0), worst.amax(0), lse.amax(0))
    return dict(layers)


def _errors(layer: Layer, grid: vsa.Grid, topk: float, backend: str) -> dict[str, Errors]:
    """Of one clip."""
    q, k, v = (x if x.dtype in DTYPES else x.bfloat16() for x in (layer.q, layer.k, layer.v))
    selection = vsa.select(q, k, topk, grid=grid)
    exact, lse = vsa.block_sparse_attention(
        q.double(), k.double(), v.double(), selection, return_lse=True, backend="torch"
    )
    _, dense = dense_attention(Layer(q, k, v), grid)
    nothing = lse.new_zeros(lse.shape)
    found = {SPARSITY: _compared(exact, dense, nothing, grid)}
    for each in PRECISIONS:
        options: dict[str, Any] = {"precision": each, "backend": backend}
        out, own = vsa.block_sparse_attention(q, k, v, selection, return_lse=True, **options)
        found[each] = _compared(out.double(), exact, own.double() - lse, grid)
    return found


def _compared(out: Tensor, truth: Tensor, off: Tensor, grid: vsa.Grid) -> Errors:
    """Of outputs (B, S, heads, head_dim) and differences (B, heads, S)."""
    tiles = [
        grid.to_tiles(x.square().sum(-1, keepdim=True)).sum((2, 4)) for x in (out - truth, truth)
    ]  # (B, n, heads)
    whole = [x.sum((0, 1)) for x in tiles]
    return Errors(
        (whole[0] / whole[1]).sqrt().cpu(),
        (tiles[0] / tiles[1]).sqrt().amax((0, 1)).cpu(),
        off.abs().amax((0, 2)).cpu(),
    )


def of_model(
    trained: Trained,
    topk: float,
    steps: int,
    at_most: float,
    backend: str,
) -> dict[str, Loop]:
    """Loss and denoising loops of a model in every way; none where its layers choose no tiles.

    Args:
        trained: the model.
        topk: share of the tiles that every layer keeps, but for ``DENSE``.
        steps: of a loop.
        at_most: error of a layer's worst head up to which ``CHOSEN`` takes low precision.
        backend: as in ``vsa.attention``.
    """
    model = trained.sparse()
    if model is None:
        return {}
    model.set_topk(topk)
    count = len(model.layers)
    ways: dict[str, Sequence[Precision]] = {
        EXACT: ["native"] * count,
        DENSE: ["native"] * count,
        **{each: [each] * count for each in PRECISIONS},
        CHOSEN: _chosen(trained, model, at_most),
    }
    found = {}
    for name, precision in ways.items():
        for block, each in zip(model.layers, precision, strict=True):
            block.attention.precision = each
            block.attention.backend = "torch" if name == EXACT else backend  # kernels take 16 bits
        model.set_topk(1.0 if name == DENSE else topk)
        under = nullcontext() if name == EXACT else _bf16(trained)
        with torch.no_grad(), under:
            loss = _loss(trained, model)
            videos = denoised(trained, model, steps)
        found[name] = Loop(tuple(precision), loss, videos)
    return found


def _bf16(trained: Trained) -> torch.autocast:
    """What low precision needs on any device."""
    return torch.autocast(trained.device.type, torch.bfloat16)


def _chosen(trained: Trained, model: VideoTransformer, at_most: float) -> list[Precision]:
    """What ``vsa.diagnostics`` makes of the first held-out batch."""
    batch = trained.held_out[0]
    with torch.no_grad(), _bf16(trained), watch_precision(model) as errors:
        model(torch.lerp(batch.video, batch.noise, batch.time[:, None, None]), batch.time)
    return errors.choose(at_most)


def _loss(trained: Trained, model: VideoTransformer) -> Tensor:
    """Held-out loss of every clip under the autocast around, (clips,) fp64 on the CPU."""
    each = [flow.clip_losses(model, x.video, x.noise, x.time) for x in trained.held_out]
    return torch.cat(each).double().cpu()


def denoised(
    trained: Trained,
    model: VideoTransformer,
    steps: int,
    before_step: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """A loop from the same noise for every model, as many clips as are held out.

    Args:
        trained: whose held-out clips and device count.
        model: that runs.
        steps: of the loop.
        before_step: called with the number of every step, for each batch of clips.

    Returns:
        (steps, clips, S, 48) fp32 on the CPU, after every step.
    """
    clips, tokens = sum(len(x.video) for x in trained.held_out), model.grid.tokens
    noise = torch.randn(clips, tokens, TOKEN_NUMBERS, generator=torch.Generator().manual_seed(0))
    found = []
    for x in noise.split(len(trained.held_out[0].video)):
        video, after = x.to(trained.device), []
        for step in range(steps):
            before_step(step)
            time = torch.full((len(video),), 1 - step / steps, device=trained.device)
            video = video - model(video, time) / steps
            after.append(video.cpu())
        found.append(torch.stack(after))
    return torch.cat(found, 1)


def difference(videos: Tensor, others: Tensor) -> Tensor:
    """|x - y| / |y| after every step, the mean over clips; (steps,)."""
    norms = [x.double().square().sum((2, 3)).sqrt() for x in (videos - others, others)]
    return (norms[0] / norms[1]).mean(1)
