# SPDX-License-Identifier: Apache-2.0
"""Plugins of SGLang-diffusion: its entry points call these in every process.

Nothing of SGLang's runtime is imported here: hooks name what they replace, and SGLang finds it when
its platform is ready.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import vsa
from vsa.installation import DISTRIBUTION
from vsa.integrations.hosts import aside, packed
from vsa.integrations.hosts.implementation import in_raster_order
from vsa.integrations.hosts.lists import from_lists

HOST = "SGLang"
BACKENDS = "sglang.multimodal_gen.runtime.layers.attention.backends"
LAYER = f"{BACKENDS}.video_sparse_attn.VideoSparseAttentionBackend.get_impl_cls"
H3_BUILD = f"{BACKENDS}.video_sparse_attn_h3.VideoSparseAttentionH3MetadataBuilder.build"
H3_LAYER = f"{BACKENDS}.video_sparse_attn_h3.VideoSparseAttentionH3Backend.get_impl_cls"
H3_KERNEL = f"{BACKENDS}.vsa_h3_kernels.vsa_h3_block_sparse_attn_forward"
LISTS = "vsa_h3_lists"
"""The entry point that replaces the kernel of MiniMax-H3."""
GIVE_BACK = f"pip uninstall -y {DISTRIBUTION} && pip install --force-reinstall --no-deps vsa==0.0.4"
"""Makes ``import vsa`` the distribution that SGLang's extra installs, without our plugins."""


def plugin() -> None:
    """Let ``--attention-backend video_sparse_attn`` run on ``vsa.attention``, in raster order."""
    _register(LAYER, _raster_class, "AROUND")


def h3_plugin() -> None:
    """Let ``transformer=video_sparse_attn_h3`` (MiniMax-H3) run in raster order as well."""
    _register(H3_BUILD, _h3_build, "AROUND")
    _register(H3_LAYER, _h3_class, "AROUND")


def lists_plugin() -> None:
    """Let MiniMax-H3's kernel over lists of padded tiles be ours, where SGLANG_PLUGINS names it.

    SGLang loads all plugins unless told otherwise. This one is for its own layers, without
    ``h3_plugin``.
    """
    from sglang.srt.environ import envs

    named = {name.strip() for name in (envs.SGLANG_PLUGINS.get() or "").split(",")}
    if LISTS in named:
        _register(H3_KERNEL, from_lists, "REPLACE")


def _raster_class(theirs: Callable[[], type]) -> type:
    """SGLang takes its kernel from ``vsa``: where that is us, there is none of its own to keep."""
    base = theirs()
    kernel = vars(sys.modules[base.__module__]).get("video_sparse_attn")
    if kernel not in (None, vsa.video_sparse_attn):
        if aside.steps_aside(HOST, "VIDEO_SPARSE_ATTN", base.__module__):
            return base
    elif why := aside.unsupported():
        aside.warn_once(
            f"vsa: VIDEO_SPARSE_ATTN of {HOST} runs on FlexAttention or PyTorch, because backend "
            f"'hopper' cannot run on this device ({why}), and {HOST}'s own kernel went with the "
            f"import name vsa: {GIVE_BACK} brings it back; vsa info says more",
            base.__module__,
        )
    return in_raster_order(base, HOST)


def _h3_build(theirs: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    """The host's own metadata, with a note for our layers where these are ours."""
    if aside.unsupported() is not None:
        return theirs(*args, **keywords)
    return packed.build(theirs, *args, **keywords)


def _h3_class(theirs: Callable[[], type]) -> type:
    base = theirs()
    if aside.steps_aside(HOST, "VIDEO_SPARSE_ATTN_H3", base.__module__):
        return base
    return packed.sglang_class(base)


def _register(target: str, hook: Callable[..., Any], kind: str) -> None:
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType

    HookRegistry.register(target, hook, HookType[kind])
