# SPDX-License-Identifier: Apache-2.0
"""Sequences beside what SGLang computes for VSA-H3, on the same random numbers.

    pip download --no-deps sglang==0.5.23
    python bench/h3_layouts.py --wheel sglang-0.5.23-*.whl

Their functions are taken out of the wheel's source and run here: how they cut a packed sequence
into tiles, and which tiles a row keeps. Attention over what they keep, and their coarse branch
over all tiles, are written out below in fp64. Needs no GPU and nothing of SGLang's but the file.
"""

from __future__ import annotations

import argparse
import ast
import functools
import math
import zipfile
from pathlib import Path
from typing import Any

import torch

import vsa
from vsa import Segment

BACKENDS = "sglang/multimodal_gen/runtime/layers/attention/backends/"
WANTED = {
    "video_sparse_attn.py": (
        "VSA_TILE_SIZE",
        "get_tile_partition_indices",
        "construct_variable_block_sizes",
        "get_non_pad_index",
    ),
    "video_sparse_attn_h3.py": (
        "VSA_H3_TILE_SHAPE",
        "VSA_H3_TILE_ELEMS",
        "VSA_H3_TILE_SHAPES",
        "PackedSegment",
        "_h3_segment_tile_geometry",
        "_compute_topk",
        "_region_tile_lists",
        "_topk_tile_lists",
    ),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "text to video": dict(segments=(70, 30, 50, (5, 6, 10)), sparsity=0.6),
    "text to video, one tile kept": dict(segments=(70, 30, 50, (5, 6, 10)), sparsity=0.99),
    "prefix competes": dict(segments=(70, 30, 50, (5, 6, 10)), sparsity=0.6, exempt=False),
    "a reference": dict(segments=(70, 30, 24, (3, 5, 9), 40, 50, (5, 6, 10)), sparsity=0.5),
    "two references": dict(segments=(70, (3, 5, 9), 24, (1, 9, 9), 50, (5, 6, 10)), sparsity=0.7),
}
KEEP_RATE = 0.3
HEADS, HEAD_DIM = 2, 16


def theirs(wheel: Path) -> dict[str, Any]:
    """Their functions and constants by name, from the wheel's own source."""
    found: dict[str, Any] = dict(torch=torch, math=math, functools=functools)
    with zipfile.ZipFile(wheel) as archive:
        for file, names in WANTED.items():
            tree = ast.parse(archive.read(BACKENDS + file))
            for name in names:
                parts = [node for node in tree.body if name in _names(node)]
                if not parts:
                    raise SystemExit(f"h3_layouts.py: error: {file} has no {name} in {wheel.name}")
                exec(compile(ast.Module(parts, []), file, "exec"), found)
    return found


def _names(node: ast.stmt) -> list[str]:
    """What a statement of a module defines."""
    if isinstance(node, ast.Assign):
        return [each.id for each in node.targets if isinstance(each, ast.Name)]
    return [node.name] if isinstance(node, ast.FunctionDef) else []


def sequence_of(segments: tuple[Any, ...], volume: int, exempt: bool) -> vsa.Sequence:
    """The same in our words: the last segment is the video, others with three sides references."""
    tile = {64: (4, 4, 4), 128: (4, 4, 8)}[volume]
    found = []
    for place, shape in enumerate(segments):
        if isinstance(shape, int):
            found.append(Segment(shape, volume, coarse=True, keys=None if exempt else "compete"))
        else:
            last = place == len(segments) - 1
            found.append(Segment(shape, tile, topk=None if last else 1.0 - (1.0 - KEEP_RATE)))
    return vsa.Sequence(found)


def compare(
    names: dict[str, Any],
    volume: int,
    segments: tuple[Any, ...],
    sparsity: float,
    exempt: bool = True,
) -> float:
    """How far our output is from what they would compute, relative L2."""
    sequence = sequence_of(segments, volume, exempt)
    tile = names["VSA_H3_TILE_SHAPES"][volume]
    geometry = names["_h3_segment_tile_geometry"]
    _, pack, _, prefix, spans = geometry(segments, tile, torch.device("cpu"))
    tiles = [[int(token) for token in row if token >= 0] for row in pack.view(-1, volume)]
    q, k, v, gate = torch.randn(4, 1, sequence.length, HEADS, HEAD_DIM, dtype=torch.float64)
    means = [torch.stack([x[0, tokens].mean(0) for tokens in tiles], 1) for x in (q, k, v)]
    scores = means[0] @ means[1].mT / math.sqrt(HEAD_DIM)
    kept = torch.ones_like(scores, dtype=torch.bool)
    videos = spans[-1][1] - prefix
    topk: float = 1.0 - sparsity
    if exempt:
        sparsities = (1.0 - KEEP_RATE,) * (len(spans) - 1) + (sparsity,)
        lists = names["_region_tile_lists"](scores, prefix, spans, sparsities)
    else:
        lists = names["_topk_tile_lists"](scores, prefix, videos, sparsity, exempt)
        topk = names["_compute_topk"](sparsity, videos) + prefix
    kept[:, prefix:] = False
    kept[:, prefix:].scatter_(-1, lists.long(), True)
    of_token = torch.empty(sequence.length, dtype=torch.long)
    for place, tokens in enumerate(tiles):
        of_token[tokens] = place
    allowed = kept[:, of_token][:, :, of_token]
    fine = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=allowed[None]
    ).transpose(1, 2)
    coarse = (scores.softmax(-1) @ means[2])[:, of_token].transpose(0, 1)
    out = vsa.attention(q, k, v, topk, grid=sequence, gate_coarse=gate, backend="torch")
    exact = fine + gate * coarse
    return ((out - exact).norm() / exact.norm()).item()


def main() -> None:
    """Compare all layouts; ends with an error where one differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", type=Path, required=True, help="of sglang 0.5.23")
    wheel = parser.parse_args().wheel
    if not wheel.is_file():
        parser.error(f"--wheel must be the file of a wheel of sglang, but there is no {wheel}")
    names = theirs(wheel)
    torch.manual_seed(0)
    wrong = 0
    for name, layout in LAYOUTS.items():
        for volume in (64, 128) if layout.get("exempt", True) else (64,):
            error = compare(names, volume, **layout)
            wrong += not error < 1e-12
            print(f"{name:30} tiles of {volume:3}: {error:.1e} from theirs")
    if wrong:
        raise SystemExit(f"h3_layouts.py: error: {wrong} layouts differ from theirs")


if __name__ == "__main__":
    main()
