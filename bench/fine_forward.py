# SPDX-License-Identifier: Apache-2.0
"""Time of the fine stage's forward kernel on a Hopper GPU, next to cuDNN's dense attention.

usage: python bench/fine_forward.py [--out results.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import vsa
from vsa.measure import seconds


def selections(grid: vsa.Grid, heads: int, topk: int) -> dict[str, vsa.Selection]:
    """Uniformly random lists, and lists of neighbours share most tiles, as trained models' do."""
    n = grid.num_tiles
    noise = torch.rand(1, heads, n, n, device="cuda")
    random = noise.topk(topk).indices
    t, h, w = (
        torch.stack(torch.unravel_index(torch.arange(n, device="cuda"), grid.tiles))
        .float()
        .unbind()
    )
    place = torch.stack((t, h, w), 1)
    distance = torch.cdist(place, place)
    smooth = functional.interpolate(noise[:, :, ::8], size=(n, n), mode="bilinear")
    correlated = (smooth * 6 - distance / 4).topk(topk).indices
    return {
        name: vsa.Selection.from_mask(
            torch.zeros_like(noise, dtype=torch.bool).scatter_(-1, index, True), grid
        )
        for name, index in (("random", random), ("correlated", correlated))
    }


def shared_by_neighbours(mask: torch.Tensor) -> float:
    """Share of a tile's list that the next tile along w has too; mask (B, heads, n_q, n_k)."""
    first, second = mask[:, :, :-1:2], mask[:, :, 1::2]
    return ((first & second).sum() / second.sum()).item()


def main() -> None:
    """Measure, print a line each, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for head_dim in (128, 64):
        for shape, heads in (((32, 32, 32), 12), ((21, 30, 52), 12), ((20, 48, 80), 8)):
            grid = vsa.Grid(shape)
            q, k, v = torch.randn(
                3, 1, grid.tokens, heads, head_dim, device="cuda", dtype=torch.bfloat16
            )
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                dense = seconds(
                    lambda q=q, k=k, v=v: functional.scaled_dot_product_attention(
                        *(x.transpose(1, 2) for x in (q, k, v))
                    ),
                    q.device,
                    7,
                )
            dense_tflops = 4 * heads * head_dim * grid.tokens**2 / statistics.median(dense) / 1e12
            topk = -(-grid.num_tiles // 8)
            sizes = grid.sizes.cuda().double()
            for name, selection in selections(grid, heads, topk).items():
                mask = selection.mask()
                pairs = (sizes[:, None] * sizes * mask).sum().item()
                shared = shared_by_neighbours(mask)
                times = seconds(
                    lambda q=q, k=k, v=v, s=selection: vsa.block_sparse_attention(
                        q, k, v, s, backend="hopper"
                    ),
                    q.device,
                    15,
                )
                time = statistics.median(times)
                row = {
                    "head_dim": head_dim,
                    "grid": shape,
                    "heads": heads,
                    "topk": topk,
                    "tiles": grid.num_tiles,
                    "lists": name,
                    "shared": shared,
                    "ms": time * 1e3,
                    "tflops": 4 * head_dim * pairs / time / 1e12,
                    "dense_ms": statistics.median(dense) * 1e3,
                    "dense_tflops": dense_tflops,
                }
                row["share"] = row["tflops"] / dense_tflops
                rows.append(row)
                print(
                    f"d{head_dim} {shape} {name:10s} shared {shared:.2f}: {row['ms']:.3f} ms, "
                    f"{row['tflops']:.0f} TFLOP/s, {row['share']:.0%} of {dense_tflops:.0f}",
                    flush=True,
                )
    if arguments.out:
        facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        arguments.out.write_text(json.dumps(facts | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
