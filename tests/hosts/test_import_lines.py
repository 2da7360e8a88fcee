# SPDX-License-Identifier: Apache-2.0
"""A script with the hosts' own import lines and call forms runs unchanged on this project.

The lines are those of facts.json, which compare_with_wheels.py holds to the hosts' source. Where
``fastvideo_kernel`` cannot be imported, ``vsa.integrations.fastvideo`` stands in for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hosts import wheels
from torch import Tensor
from torch.nn import functional

from vsa.integrations.fastvideo import kernel
from vsa.integrations.hosts.patches import Patches

NOT_OURS = {"fastvideo_kernel.triton_kernels.index.map_to_index"}
"""What hosts make lists with for a kernel of sm_100a; no attention of theirs that we replace."""
LINES = sorted(
    {
        fact["name"]
        for host in wheels.facts()
        for fact in host["facts"]
        if fact["what"] == "import" and fact["name"].split(".")[0] in ("vsa", "fastvideo_kernel")
    }
    - NOT_OURS
)
HEADS, HEAD_DIM = 2, 16


@pytest.fixture
def names() -> Iterator[dict[str, Any]]:
    """What a script has after these lines; of one name in two packages, FastVideo's."""
    patches = Patches("FastVideo")
    kernel.stand_in(patches)
    found: dict[str, Any] = {}
    for line in sorted(LINES, reverse=True):
        module, _, name = line.rpartition(".")
        exec(f"from {module} import {name}", found)
    yield found
    patches.undo()


def test_the_lines_are_those_of_all_three_hosts() -> None:
    assert {"vsa.video_sparse_attn", "vsa.block_sparse_attn"} <= set(LINES)
    for name in ("video_sparse_attn", "video_sparse_attn_bshd"):
        assert f"fastvideo_kernel.{name}" in LINES
    for module, name in (
        ("block_sparse_attn", "block_sparse_attn"),
        ("block_sparse_attn", "block_sparse_attn_from_indices"),
        ("block_sparse_attn_256", "block_sparse_attn_256_bshd"),
    ):
        assert any(line.endswith(name) for line in LINES), (module, name)


def tiles(sizes: list[int], volume: int) -> tuple[Tensor, Tensor]:
    """Padded tokens (1, heads, slots, head_dim), zeros where there is none; and which are real."""
    real = torch.cat([torch.arange(volume) < size for size in sizes])
    x = torch.randn(1, HEADS, len(real), HEAD_DIM, dtype=torch.float64)
    return x * real[:, None], real


def dense(q: Tensor, k: Tensor, v: Tensor, of_queries: Tensor, of_keys: Tensor) -> Tensor:
    """Attention among real tokens, which the output is where every tile is kept."""
    out = functional.scaled_dot_product_attention(q, k[:, :, of_keys], v[:, :, of_keys])
    return out * of_queries[:, None]


def near(out: Tensor, right: Tensor, real: Tensor) -> None:
    torch.testing.assert_close(out[:, :, real], right[:, :, real], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("block", "volume"), [((4, 4, 4), 64), ((4, 4, 8), 128), ((4, 8, 8), 256)])
def test_calls_over_whole_videos(
    names: dict[str, Any], block: tuple[int, int, int], volume: int
) -> None:
    torch.manual_seed(volume)
    counts = [volume, 17, volume - 24]
    sizes = torch.tensor(counts)
    (q, real), (k, _), (v, _) = (tiles(counts, volume) for _ in range(3))
    zeros = torch.zeros_like(q)
    right = dense(q, k, v, real, real)
    whole = names["video_sparse_attn"]
    # FastVideo's layer and fastvideo-kernel, SGLang's layer, and the distribution vsa 0.0.4
    near(whole(q, k, v, sizes, sizes, 3, block_size=block, compress_attn_weight=zeros), right, real)
    near(
        whole(
            q,
            k,
            v,
            variable_block_sizes=sizes,
            topk=3,
            block_size=block,
            compress_attn_weight=zeros,
        ),
        right,
        real,
    )
    near(whole(q, k, v, sizes, 3, block, zeros), right, real)
    flipped = [x.transpose(1, 2) for x in (q, k, v)]
    out = names["video_sparse_attn_bshd"](
        *flipped, sizes, sizes, 3, block_size=block, compress_attn_weight=zeros.transpose(1, 2)
    )
    near(out.transpose(1, 2), right, real)
    # vLLM-Omni's operator
    out = names["video_sparse_attn_bshd"](
        *flipped,
        variable_block_sizes=sizes,
        q_variable_block_sizes=sizes,
        topk=3,
        block_size=block,
        compress_attn_weight=zeros.transpose(1, 2),
    )
    near(out.transpose(1, 2), right, real)


@pytest.mark.parametrize("volume", [64, 128, 256])
@pytest.mark.parametrize("drops", [True, False])
def test_calls_with_maps_and_lists(names: dict[str, Any], volume: int, drops: bool) -> None:
    """Queries of two tiles, keys of three, with the log-sum-exp; and each row's own tiles."""
    torch.manual_seed(volume)
    of_keys = [volume, 17, volume - 24]
    sizes = torch.tensor(of_keys)
    q, _ = tiles([volume] * 2, volume)
    (k, real), (v, _) = (tiles(of_keys, volume) for _ in range(2))
    kept = torch.ones(1, HEADS, 2, 3, dtype=torch.bool)
    kept[:, :, 0, 1] = not drops
    right, lse = [], []
    for row in range(2):
        there = real & kept[0, 0, row].repeat_interleave(volume)
        mine = q[:, :, row * volume : (row + 1) * volume]
        scores = mine @ k[:, :, there].mT / math.sqrt(HEAD_DIM)
        right.append(scores.softmax(-1) @ v[:, :, there])
        lse.append(scores.logsumexp(-1))
    out, found = names["block_sparse_attn"](q, k, v, kept, sizes)
    torch.testing.assert_close(out, torch.cat(right, 2), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.double(), torch.cat(lse, 2), rtol=0, atol=1e-4)
    if volume == 64:
        lists = torch.tensor([[0, 2, -1] if drops else [0, 1, 2], [0, 1, 2]])
        lists = lists.int().expand(1, HEADS, 2, 3)
        number = kept.sum(-1).int()
        by_lists = names["block_sparse_attn_from_indices"](q, k, v, lists, number, sizes)
        torch.testing.assert_close(by_lists[0], out)
        torch.testing.assert_close(by_lists[1], found)
    if volume == 256:
        square = torch.cat([kept, kept[:, :, :1]], dim=2)
        q = torch.cat([q, q[:, :, :volume]], dim=2)
        flipped = [x.transpose(1, 2) for x in (q, k, v)]
        for given in (square, square[0]):  # with a batch, and without
            by_map, _ = names["block_sparse_attn_256_bshd"](*flipped, given, sizes)
            torch.testing.assert_close(by_map.transpose(1, 2)[:, :, : 2 * volume], out)
