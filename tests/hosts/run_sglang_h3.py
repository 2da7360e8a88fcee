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
SEGMENTS, GRID = (70, 20, 64), (5, 12, 10)
FP32 = 1e-5
"""Means and scores of the host's layer are fp32."""


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
        for plugin in (sglang.lists_plugin, sglang.h3_plugin):
            plugin()
            hooks.apply_hooks()
            for volume, tile in ((64, (4, 4, 4)), (128, (4, 4, 8))):
                yield from _layer(module, volume, tile, plugin.__name__)
        if not {sglang.H3_BUILD, sglang.H3_LAYER, sglang.H3_KERNEL} <= hooks._patched:
            raise SystemExit("SGLang did not apply the hooks")


def _layer(module: Any, volume: int, tile: tuple[int, int, int], path: str) -> Iterator[Found]:
    tiles, before = reference.packed_tiles(SEGMENTS, reference.video_tiles(GRID, tile), volume)
    for sparsity in (0.5, 0.8):
        made = module.VideoSparseAttentionH3Backend.get_impl_cls()(
            HEADS, HEAD_DIM, False, HEAD_DIM**-0.5, prefix="blocks.3.attn"
        )
        meta = module.VideoSparseAttentionH3MetadataBuilder().build(
            current_timestep=0,
            raw_latent_shape=GRID,
            patch_size=(1, 1, 1),
            VSA_sparsity=sparsity,
            prefix_segments=SEGMENTS,
            device=torch.device("cpu"),
            tile_size=volume,
        )
        length = meta.total_seq_length
        inputs = [x[:1].float() for x in tensors(length)]
        q, k, v, gate = (functional.pad(x[0], (0, 0, 0, 0, 0, 5)) for x in inputs)
        call = dict(cu_seqlens=torch.tensor([0, length, length + 5]), max_seqlen=length)
        call |= dict(cu_seqlens_host=(0, length, length + 5), attn_metadata=meta)
        topk = module._compute_topk(sparsity, meta.num_video_tiles)
        name = f"VideoSparseAttentionH3Impl, {path}, tiles of {volume}, {sparsity}"
        out = made.forward_varlen(q, k, v, gate_compress=gate, **call)
        right = reference.attention(*inputs[:3], tiles, topk, inputs[3], before)
        yield Found(name, error(out[None, :length], right) + out[length:].abs().max().item(), FP32)
        # As after an all-to-all, where the gate's rows are another rank's.
        out, coarse = made.forward_varlen(q, k, v, return_compress=True, **call)
        blocks = meta.unpack_index[:length].long() // 64
        whole = out[:length] + gate[:length] * coarse[:, blocks].transpose(0, 1)
        yield Found(f"{name}, coarse apart", error(whole[None], right), FP32)


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
