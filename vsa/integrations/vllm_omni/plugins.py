# SPDX-License-Identifier: Apache-2.0
"""What vLLM-Omni's entry points call, in every process."""

from __future__ import annotations

from importlib import import_module

from vsa.integrations.hosts.lists import PROVIDED

BACKEND = "vsa.integrations.vllm_omni.backend.VsaBackend"
LISTS = "vsa_h3_lists"
"""The entry point that replaces the kernel of MiniMax-H3."""


def plugin() -> None:
    """Let the slot FASTVIDEO_VSA run on ``vsa.attention``."""
    from vllm_omni.diffusion.attention.backends.registry import (
        DiffusionAttentionBackendEnum,
        register_diffusion_backend,
    )

    register_diffusion_backend(DiffusionAttentionBackendEnum.FASTVIDEO_VSA, BACKEND)


def lists_plugin() -> None:
    """Let FastVideo's kernel over maps of padded tiles be ours, where VLLM_PLUGINS names this.

    vLLM-Omni loads all plugins unless told otherwise. This one is for its own layers, without
    ``plugin``, on GPUs whose padded tiles our kernels take.
    """
    from vllm import envs

    if LISTS not in (envs.VLLM_PLUGINS or []):
        return
    name = "fastvideo_kernel.block_sparse_attn"  # where the layer takes it from at every call
    module = import_module(name)
    for function, ours in PROVIDED[name].items():
        setattr(module, function, ours)
