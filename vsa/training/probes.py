# SPDX-License-Identifier: Apache-2.0
"""What attention does inside a model: recall of tiles, and how far gates are open."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from vsa.diagnostics.metrics import sampled_recall
from vsa.diagnostics.record import SAMPLED_TILES
from vsa.functional import select
from vsa.training.attention import FixedAttention
from vsa.training.data import Batch
from vsa.training.model import VideoTransformer

GATES = {"gate_coarse": "to_gate_compress", "gate_fine": "to_gate_fine"}
"""Names in results, and the layers that make them."""


@contextmanager
def watched(model: VideoTransformer) -> Iterator[dict[str, list[tuple[Tensor, ...]]]]:
    """What the model's layers make while it runs inside, in their order.

    Yields:
        A dict that fills: "qk", pairs (B, S, heads, 64) after norm and turn, and the gates by the
        names of ``GATES``, (B, S, dim) in one-tuples.
    """
    found: dict[str, list[tuple[Tensor, ...]]] = {"qk": []}
    handles = []

    def watch(module: torch.nn.Module, name: str) -> None:
        def note(_: object, __: object, out: tuple[Tensor, ...] | Tensor) -> None:
            found[name].append(out if isinstance(out, tuple) else (out,))

        handles.append(module.register_forward_hook(note))

    for block in model.layers:
        watch(block.position, "qk")
        for name, attribute in GATES.items():
            if (layer := getattr(block.attention, attribute)) is not None:
                found.setdefault(name, [])
                watch(layer, name)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def probe(model: VideoTransformer, batches: Sequence[Batch], topk: float) -> dict[str, list[float]]:
    """Run the model and look at every layer.

    Args:
        model: of any kind, under the autocast that it trains in.
        batches: what it sees, one after the other.
        topk: budget that recall is measured at.

    Returns:
        "recall": share of dense attention, sampled, that the tiles hold which the layer attends,
        or would attend at ``topk`` if it is dense or coarse; "recall_low": that of its worst head;
        and mean magnitudes of the gates that there are. A number per layer each, the mean over
        batches.
    """
    results: dict[str, list[Tensor]] = {}
    for batch in batches:
        for name, values in _probe(model, batch, topk).items():
            results.setdefault(name, []).append(torch.stack(values).float())
    return {name: torch.stack(values).mean(0).tolist() for name, values in results.items()}


def _probe(model: VideoTransformer, batch: Batch, topk: float) -> dict[str, list[Tensor]]:
    """One batch: numbers () per layer."""
    with watched(model) as found:
        model(torch.lerp(batch.video, batch.noise, batch.time[:, None, None]), batch.time)
    low, mean = [], []
    for block, (q, k) in zip(model.layers, found.pop("qk"), strict=True):
        layer = block.attention
        if isinstance(layer, FixedAttention):
            selection = layer.selection(len(q))
        else:
            selection = select(q, k, topk, grid=model.grid)
        recall = sampled_recall(selection, q, k, tiles=SAMPLED_TILES).mean(0)
        mean.append(recall.mean())
        low.append(recall.min())
    results = {"recall": mean, "recall_low": low}
    for name, outputs in found.items():
        results[name] = [gate.float().abs().mean() for (gate,) in outputs]
    return results
