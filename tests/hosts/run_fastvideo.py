# SPDX-License-Identifier: Apache-2.0
"""FastVideo's own layers: Wan's and MiniMax-H3's, with our kernels below and by ``install``."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from hosts import loose, reference, wheels
from hosts.wan_layers import HEAD_DIM, HEADS, Found, error, layers, tensors
from torch import Tensor

import vsa
from vsa.integrations.fastvideo import install, uninstall
from vsa.integrations.hosts import lists

BASE = "fastvideo.attention"
REAL = {
    f"{BASE}.layer",
    f"{BASE}.backends.abstract",
    f"{BASE}.backends.video_sparse_attn",
    f"{BASE}.backends.video_sparse_attn_h3",
}
SEGMENTS, GRID = (70, 20, 64), (5, 12, 10)
FP32 = 1e-6
"""Means and scores of the host's MiniMax-H3 layer are fp32."""
PADDED = "their padding, our kernel"


def run(folder: Path) -> Iterator[Found]:
    """Every layer, twice."""
    root = wheels.fetch("fastvideo", "0.2.1", folder)
    with loose.Only(root, {"fastvideo", "fastvideo_kernel"}, REAL):
        context = SimpleNamespace(attn_metadata=None)
        make_ready(context)
        module = importlib.import_module(f"{BASE}.backends.video_sparse_attn")
        layer = importlib.import_module(f"{BASE}.layer").DistributedAttention_VSA
        shape = dict(num_heads=HEADS, head_size=HEAD_DIM)
        module.video_sparse_attn = vsa.video_sparse_attn
        yield from layers(module, layer(**shape), context, _call, PADDED, ours=False)
        h3 = importlib.import_module(f"{BASE}.backends.video_sparse_attn_h3")
        h3.block_sparse_attn_64_bhsd = vsa.block_sparse_attn
        h3.block_sparse_attn_256_bshd = lists.from_map_256_bshd
        yield from _h3(h3, PADDED)
        install(lists=True)
        yield from layers(module, layer(**shape), context, _call, "after install()", ours=True)
        yield from _h3(h3, "after install()")
        uninstall()
        if module.VideoSparseAttentionBackend.get_impl_cls() is not module.VideoSparseAttentionImpl:
            raise SystemExit("uninstall() left something behind")


def make_ready(context: Any) -> None:
    """What the layers take from the rest of FastVideo: one rank, a context, a choice of backend."""

    def chosen(*_: Any, **__: Any) -> Any:
        return importlib.import_module(
            f"{BASE}.backends.video_sparse_attn"
        ).VideoSparseAttentionBackend

    loose.give("fastvideo.distributed", get_sp_group=lambda: SimpleNamespace(world_size=1))
    loose.give(
        "fastvideo.distributed.communication_op",
        sequence_model_parallel_all_to_all_4D=lambda x, **_: x,
    )
    loose.give("fastvideo.forward_context", get_forward_context=lambda: context)
    loose.give("fastvideo.utils", get_compute_dtype=lambda: torch.float64)
    loose.give(f"{BASE}.selector", get_attn_backend=chosen, backend_name_to_enum=str)
    loose.give(f"{BASE}.backends.video_sparse_attn_h3_probe", probe_enabled=lambda: None)


def _call(layer: Any, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    return layer(q, k, v, q.shape[1], gate_compress=gate)[0]


def _h3(module: Any, path: str) -> Iterator[Found]:
    for volume, tile in ((64, (4, 4, 4)), (256, (4, 8, 8))):
        tiles, before = reference.packed_tiles(SEGMENTS, reference.video_tiles(GRID, tile), volume)
        for sparsity, exempt in ((0.5, True), (0.8, True), (0.5, False), (0.8, False)):
            made = module.MiniMaxH3VSABackend.get_impl_cls()(HEADS, HEAD_DIM, False, HEAD_DIM**-0.5)
            meta = module.MiniMaxH3VSAMetadataBuilder().build(
                current_timestep=0,
                raw_latent_shape=GRID,
                patch_size=(1, 1, 1),
                VSA_sparsity=sparsity,
                prefix_segments=SEGMENTS,
                device=torch.device("cpu"),
                tile_size=volume,
                exempt=exempt,
            )
            q, k, v, gate = tensors(meta.total_seq_length)
            tiled = made.preprocess_qkv(torch.cat([q, k, v, gate]), meta)
            out = made.postprocess_output(made.forward(*tiled.chunk(4), meta), meta)
            rule = before, meta.num_video_tiles, sparsity, exempt

            def theirs(scores: Tensor, rule: Any = rule) -> Tensor:
                return module._build_block_mask(scores, *rule)

            right = reference.attention(q, k, v, tiles, 0, gate, choose=theirs)
            kind = "kept" if exempt else "competing"
            name = f"{type(made).__name__}, {path}, {kind}, tiles of {volume}, {sparsity}"
            yield Found(name, error(out, right), FP32 if path == PADDED else 1e-12)
