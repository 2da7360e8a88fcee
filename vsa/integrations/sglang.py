# SPDX-License-Identifier: Apache-2.0
"""Plugins of SGLang-diffusion: its entry points call these in every process.

Nothing of SGLang's runtime is imported here: hooks name what they replace, and SGLang finds it when
its platform is ready.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vsa.integrations.hosts import packed
from vsa.integrations.hosts.implementation import in_raster_order
from vsa.integrations.hosts.lists import from_lists

HOST = "SGLang"
BACKENDS = "sglang.multimodal_gen.runtime.layers.attention.backends"
LAYER = f"{BACKENDS}.video_sparse_attn.VideoSparseAttentionBackend.get_impl_cls"
H3_BUILD = f"{BACKENDS}.video_sparse_attn_h3.VideoSparseAttentionH3MetadataBuilder.build"
H3_FORWARD = f"{BACKENDS}.video_sparse_attn_h3.VideoSparseAttentionH3Impl.forward_varlen"
H3_KERNEL = f"{BACKENDS}.vsa_h3_kernels.vsa_h3_block_sparse_attn_forward"
LISTS = "vsa_h3_lists"
"""The entry point that replaces the kernel of MiniMax-H3."""


def plugin() -> None:
    """Let ``--attention-backend video_sparse_attn`` run on ``vsa.attention``, in raster order."""
    _register(LAYER, _raster_class, "AROUND")


def h3_plugin() -> None:
    """Let ``transformer=video_sparse_attn_h3`` (MiniMax-H3) run in raster order as well."""
    _register(H3_BUILD, packed.build, "AROUND")
    _register(H3_FORWARD, packed.sglang_forward, "AROUND")


def lists_plugin() -> None:
    """Let MiniMax-H3's kernel over lists of padded tiles be ours, where SGLANG_PLUGINS names it.

    SGLang loads all plugins unless told otherwise. This one is for requests that ``h3_plugin``
    refuses, and for GPUs whose padded tiles our kernels take.
    """
    from sglang.srt.environ import envs

    named = {name.strip() for name in (envs.SGLANG_PLUGINS.get() or "").split(",")}
    if LISTS in named:
        _register(H3_KERNEL, from_lists, "REPLACE")


def _raster_class(theirs: Callable[[], type]) -> type:
    return in_raster_order(theirs(), HOST)


def _register(target: str, hook: Callable[..., Any], kind: str) -> None:
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType

    HookRegistry.register(target, hook, HookType[kind])
