# SPDX-License-Identifier: Apache-2.0
"""What a test must leave as it found it: settings of a process that all later tests compute under.

A setting that stays changed fails no test of its own. It makes others, which happen to run later in
the same process, compare something else than they say.
"""

from __future__ import annotations

import os
import sys

import torch


def process_state() -> dict[str, object]:
    """Settings of PyTorch, of this thread's modes, and of what else a test may change, by name."""
    cuda = torch.backends.cuda
    state: dict[str, object] = {
        "flash attention": cuda.flash_sdp_enabled(),
        "memory efficient attention": cuda.mem_efficient_sdp_enabled(),
        "attention by plain products": cuda.math_sdp_enabled(),
        "cuDNN's attention": cuda.cudnn_sdp_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "precision of float32 products": torch.get_float32_matmul_precision(),
        "deterministic algorithms": torch.get_deterministic_debug_mode(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "anomaly detection": torch.is_anomaly_enabled(),
        "working directory": os.getcwd(),
    }
    # On a Hopper GPU PyTorch itself puts cuDNN first when attention is computed for the first time.
    if not torch.cuda.is_available():
        state["order of attention's kernels"] = torch._C._get_sdp_priority_order()
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    if dispatch is not None:
        state["diffusers' attention"] = str(dispatch._AttentionBackendRegistry._active_backend)
    return state


def changes(before: dict[str, object]) -> list[str]:
    """What is not as it was, in words."""
    after = process_state()
    return [
        f"{name} was {was} and is {after[name]}"
        for name, was in before.items()
        if after.get(name, was) != was  # a test may have taken a module out of sys.modules
    ]
