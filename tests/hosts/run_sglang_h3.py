# SPDX-License-Identifier: Apache-2.0
"""SGLang's own MiniMax-H3 layer, its lists of tiles, and our drop-in by its registry of hooks.

Its Triton kernels that gather tokens into tiles and scatter them back are a few lines of PyTorch
here; choice, lists, workspaces and the coarse branch are the host's.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from hosts import loose, reference, wheels
from hosts.wan_layers import HEAD_DIM, HEADS, Found, error, tensors
from torch import Tensor
from torch.nn import functional

from vsa.integrations import sglang

BASE = "sglang.multimodal_gen.runtime"
BACKENDS = f"{BASE}.layers.attention.backends"
REAL = {
    f"{BACKENDS}.attention_backend",
    f"{BACKENDS}.video_sparse_attn",
    f"{BACKENDS}.video_sparse_attn_h3",
    f"{BASE}.platforms.plugins",
    "sglang.srt.plugins.hook_registry",
}
GRID = (5, 12, 10)
LAYOUTS: dict[str, dict[str, Any]] = {
    "kept": dict(segments=(70, 20, 64, GRID)),
    "competing": dict(segments=(70, 20, 64, GRID), exempt=False),
    "a reference": dict(segments=(70, 30, 24, (3, 5, 9), 40, 50, GRID)),
    "two references": dict(segments=(70, (3, 5, 9), 24, (1, 9, 9), 50, GRID)),
}
FP32, FP64 = 1e-5, 1e-12
"""Means and scores of the host's own layer are fp32; it has no others in the place of theirs."""


def run(folder: Path) -> Iterator[Found]:
    """Tiles of 64 and of 128, with a gate."""
    root = wheels.fetch("sglang", "0.5.23", folder)
    with loose.Only(root, {"sglang"}, REAL):
        loose.give("sglang.kernels.ops.diffusion", can_use_vsa_block_sparse_sm100=_no)
        loose.give(
            f"{BACKENDS}.vsa_h3_kernels",
            vsa_h3_block_sparse_attn_forward=_theirs,
            vsa_h3_pack_tiles=_pack,
            vsa_h3_topk_lists=_write_lists,
            vsa_h3_untile=_untile,
        )
        named = SimpleNamespace(get=lambda: f"vsa,{sglang.LISTS}")
        loose.give("sglang.srt.environ", envs=SimpleNamespace(SGLANG_PLUGINS=named))
        module = importlib.import_module(f"{BACKENDS}.video_sparse_attn_h3")
        hooks = importlib.import_module(f"{BASE}.platforms.plugins").HookRegistry
        for plugin, limit in ((sglang.lists_plugin, FP32), (sglang.h3_plugin, FP64)):
            plugin()
            hooks.apply_hooks()
            for name, layout in LAYOUTS.items():
                for volume in (64, 128):
                    yield from _layer(module, volume, f"{plugin.__name__}, {name}", limit, **layout)
        if not {sglang.H3_BUILD, sglang.H3_LAYER, sglang.H3_KERNEL} <= hooks._patched:
            raise SystemExit("SGLang did not apply the hooks")


def _layer(
    module: Any, volume: int, path: str, limit: float, segments: Any, exempt: bool = True
) -> Iterator[Found]:
    """The layer on a layout, beside attention over the tiles that the host's own rule keeps."""
    tile = module.VSA_H3_TILE_SHAPES[volume]
    flat = tuple(each for each in segments[:-1] if isinstance(each, int))
    for sparsity in (0.0, 0.5, 0.8):
        made = module.VideoSparseAttentionH3Backend.get_impl_cls()(
            HEADS, HEAD_DIM, False, HEAD_DIM**-0.5, prefix="blocks.3.attn"
        )
        meta = module.VideoSparseAttentionH3MetadataBuilder().build(
            current_timestep=0,
            raw_latent_shape=segments[-1],
            patch_size=(1, 1, 1),
            VSA_sparsity=sparsity,
            prefix_segments=flat,
            packed_segments=segments if len(flat) < len(segments) - 1 else None,
            ref_keep_rate=0.3,
            device=torch.device("cpu"),
            tile_size=volume,
            exempt=exempt,
        )
        length = meta.total_seq_length
        inputs = [x[:1] for x in tensors(length)]
        if limit == FP32:
            inputs = [x.float() for x in inputs]
        q, k, v, gate = (functional.pad(x[0], (0, 0, 0, 0, 0, 5)) for x in inputs)
        call = dict(cu_seqlens=torch.tensor([0, length, length + 5]), max_seqlen=length)
        call |= dict(cu_seqlens_host=(0, length, length + 5), attn_metadata=meta)
        tiles = meta.unpack_index[:length].long() // volume

        def theirs(scores: Tensor, meta: Any = meta, sparsity: float = sparsity) -> Tensor:
            return _kept_by_the_host(module, meta, scores, sparsity)

        right = reference.attention(*inputs[:3], tiles, 0, inputs[3], choose=theirs)
        name = f"VideoSparseAttentionH3Impl, {path}, {tile}, {sparsity}"
        out = made.forward_varlen(q, k, v, gate_compress=gate, **call)
        yield Found(name, error(out[None, :length], right) + out[length:].abs().max().item(), limit)
        # As after an all-to-all, where the gate's rows are another rank's.
        out, coarse = made.forward_varlen(q, k, v, return_compress=True, **call)
        blocks = meta.unpack_index[:length].long() // 64
        whole = out[:length] + gate[:length] * coarse[:, blocks].transpose(0, 1)
        yield Found(f"{name}, coarse apart", error(whole[None], right), limit)


def _kept_by_the_host(module: Any, meta: Any, scores: Tensor, sparsity: float) -> Tensor:
    """By its own functions, from exact scores (1, heads, n, n)."""
    kept = torch.ones_like(scores[0], dtype=torch.bool)
    prefix, rows = meta.num_prefix_tiles, slice(meta.num_prefix_tiles, None)
    if sparsity <= 0.0:
        return kept[None]
    if meta.uses_regions:
        spans, sparsities = meta.video_tile_spans, meta.span_sparsities
        lists = module._region_tile_lists(scores[0], prefix, spans, sparsities)
    else:
        videos = meta.num_video_tiles
        lists = module._topk_tile_lists(scores[0], prefix, videos, sparsity, meta.exempt)
    kept[:, rows] = False
    kept[:, rows].scatter_(-1, lists.long(), True)
    return kept[None]


def _no(*_: Any) -> bool:
    return False


def _theirs(*_: Any, **__: Any) -> Tensor:
    raise SystemExit("SGLang called its own kernel, which is to be ours")


def _pack(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    source: Tensor,
    sizes: Tensor,
    tiled: Tensor,
    pooled: Tensor,
) -> None:
    rows = torch.where(source >= 0, source, 0).long()
    for index, x in enumerate((q, k, v, gate) if gate is not None else (q, k, v)):
        gathered = torch.where((source >= 0)[:, None, None], x[rows], 0).transpose(0, 1)
        tiled[index, :, : len(source)] = gathered
        if index < 3:
            pooled[index] = gathered.unflatten(1, (-1, 64)).sum(2) / sizes[:, None]


def _write_lists(picked: Tensor, mask: Tensor, out: Tensor, before: int) -> None:
    out[..., before : before + picked.shape[-1]] = picked.sort(dim=-1).values + before


def _untile(
    tiled: Tensor,
    gate: Tensor | None,
    coarse: Tensor | None,
    rows: Tensor,
    used: int,
    result: Tensor,
) -> None:
    result.zero_()
    whole = tiled
    if gate is not None and coarse is not None:
        whole = tiled + gate * coarse.repeat_interleave(64, dim=1)[:, : tiled.shape[1]]
    result[:used] = whole[:, rows[:used].long()].transpose(0, 1)
