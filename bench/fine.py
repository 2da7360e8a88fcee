# SPDX-License-Identifier: Apache-2.0
"""Time of the fine stage's kernels on a Hopper GPU, next to cuDNN's dense attention.

usage: python bench/fine.py [--lists captured.pt] [--out results.json]

Forward and backward, on uniformly random lists, on lists that neighbours share, and on captured
ones where bench/captured.py wrote a file that holds the layer. TFLOP/s count products between real
tokens of selected tiles: two forward, five backward. The backward's time is that of the whole
operator: the transpose of the selection, the pass over tokens and both kernels.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import vsa
from facts import facts
from vsa.measure import patterns
from vsa.measure.timing import seconds, spread

SHAPES = (((32, 32, 32), 12), ((21, 30, 52), 12), ((20, 48, 80), 8))
"""Grids and heads."""
PRODUCTS = {"forward": 2, "backward": 5}


def dense_seconds(q: Tensor, k: Tensor, v: Tensor, upstream: Tensor) -> dict[str, list[float]]:
    """Of cuDNN, forward and backward."""
    leaves = [x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v)]
    upstream = upstream.transpose(1, 2)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        with torch.no_grad():
            forward = seconds(lambda: functional.scaled_dot_product_attention(*leaves), q.device, 7)
        out = functional.scaled_dot_product_attention(*leaves)
        backward = seconds(
            lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True), q.device, 7
        )
    return {"forward": forward, "backward": backward}


def our_seconds(
    q: Tensor, k: Tensor, v: Tensor, upstream: Tensor, selection: vsa.Selection
) -> dict[str, list[float]]:
    """Of the operators, forward and backward."""
    grid = selection.grid.as_ints()
    plan = selection.bitmap, None, grid, grid, selection.num_key_tiles, q.shape[-1] ** -0.5
    out, lse = torch.ops.vsa.block_sparse_attention(q, k, v, *plan, "hopper")
    saved = upstream, None, q, k, v, out, lse, *plan, "hopper"
    return {
        "forward": seconds(
            lambda: torch.ops.vsa.block_sparse_attention(q, k, v, *plan, "hopper"), q.device, 15
        ),
        "backward": seconds(
            lambda: torch.ops.vsa.block_sparse_attention_backward(*saved), q.device, 15
        ),
    }


def measure(
    head_dim: int, shape: tuple[int, int, int], heads: int, kinds: Sequence[str], file: Path | None
) -> Iterator[dict[str, Any]]:
    """A row for each kind of lists and each direction."""
    grid = vsa.Grid(shape)
    size = 1, grid.tokens, heads, head_dim
    tensors = torch.randn(4, *size, device="cuda", dtype=torch.bfloat16).unbind()
    dense = dense_seconds(*tensors)
    topk = -(-grid.num_tiles // 8)
    sizes = grid.sizes.cuda().double()
    for name in kinds:
        selection = patterns.selection(name, grid, heads, topk, sizes.device, file)
        pairs = (sizes[:, None] * sizes * selection.mask()).sum().item()
        for direction, times in our_seconds(*tensors, selection).items():
            flops = 2 * PRODUCTS[direction] * head_dim
            time, dense_time = statistics.median(times), statistics.median(dense[direction])
            dense_tflops = flops * heads * grid.tokens**2 / dense_time / 1e12
            tflops = flops * pairs / time / 1e12
            yield {
                "direction": direction,
                "head_dim": head_dim,
                "grid": shape,
                "heads": heads,
                "topk": topk,
                "tiles": grid.num_tiles,
                "lists": name,
                "shared": patterns.shared_along_w(selection),
                "ms": time * 1e3,
                "spread": spread(times),
                "tflops": tflops,
                "dense_ms": dense_time * 1e3,
                "dense_tflops": dense_tflops,
                "share": tflops / dense_tflops,
            }


def main() -> None:
    """Measure, print a line each, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lists", type=Path, metavar="FILE", help="made by bench/captured.py")
    parser.add_argument("--commit", help="of the sources, where they are no clone")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU is visible, and these kernels need a Hopper one: H100 or H200")
    about = facts(torch.device("cuda", 0), arguments.commit)
    kept = patterns.layers(arguments.lists) if arguments.lists else ()
    rows = []
    for head_dim in (128, 64):
        for shape, heads in SHAPES:
            is_captured = patterns.layer_name(vsa.Grid(shape)) in kept
            kinds = patterns.KINDS if is_captured else patterns.DRAWN
            for row in measure(head_dim, shape, heads, kinds, arguments.lists):
                rows.append(row)
                print(
                    f"{row['direction']:8s} d{head_dim} {shape} {row['lists']:10s} shared "
                    f"{row['shared']:.2f}: {row['ms']:.3f} ms, {row['tflops']:.0f} TFLOP/s, "
                    f"{row['share']:.0%} of {row['dense_tflops']:.0f}",
                    flush=True,
                )
    if arguments.out:
        arguments.out.write_text(json.dumps(about | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
