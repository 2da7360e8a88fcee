# SPDX-License-Identifier: Apache-2.0
"""SGLang-diffusion's own layer, with our kernel below, and by its own registry of hooks."""

from __future__ import annotations

import enum
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from hosts import loose, wheels
from hosts.wan_layers import HEAD_DIM, HEADS, Found, layers
from torch import Tensor

import vsa
from vsa.integrations import sglang

BASE = "sglang.multimodal_gen.runtime"
REAL = {
    f"{BASE}.layers.attention.layer",
    f"{BASE}.layers.attention.backends.attention_backend",
    f"{BASE}.layers.attention.backends.video_sparse_attn",
    f"{BASE}.platforms.plugins",
    "sglang.srt.plugins.hook_registry",
}

PADDED = "their padding, our kernel"


class Backends(enum.Enum):
    """Members that the layer asks for."""

    VIDEO_SPARSE_ATTN = enum.auto()
    FA = enum.auto()
    DYNAMIC_CUDNN_SDPA = enum.auto()
    is_sparse = True


def run(folder: Path) -> Iterator[Found]:
    """The layer twice."""
    root = wheels.fetch("sglang", "0.5.23", folder)
    with loose.Only(root, {"sglang"}, REAL):
        context = SimpleNamespace(attn_metadata=None)
        _make_ready(context)
        module = importlib.import_module(f"{BASE}.layers.attention.backends.video_sparse_attn")
        layer = importlib.import_module(f"{BASE}.layers.attention.layer").UlyssesAttention_VSA
        shape = dict(num_heads=HEADS, head_size=HEAD_DIM)
        module.video_sparse_attn = vsa.video_sparse_attn
        yield from layers(module, layer(**shape), context, _call, PADDED, ours=False)
        sglang.plugin()
        hooks = importlib.import_module(f"{BASE}.platforms.plugins").HookRegistry
        hooks.apply_hooks()
        if sglang.LAYER not in hooks._patched:
            raise SystemExit("SGLang did not apply the hook")
        yield from layers(module, layer(**shape), context, _call, "by the plugin", ours=True)


def _make_ready(context: Any) -> None:
    """What the layer takes from the rest of SGLang: one rank, a context, a choice of backend."""

    def chosen(*_: Any, **__: Any) -> Any:
        return importlib.import_module(
            f"{BASE}.layers.attention.backends.video_sparse_attn"
        ).VideoSparseAttentionBackend

    arguments = SimpleNamespace(kv_gather_degree=1)
    loose.give(f"{BASE}.distributed", get_sp_group=lambda: SimpleNamespace(world_size=1))
    loose.give(f"{BASE}.distributed.parallel_state", get_ring_parallel_world_size=lambda: 1)
    loose.give(
        f"{BASE}.distributed.communication_op",
        sequence_model_parallel_all_to_all_4D=lambda x, **_: x,
    )
    loose.give(f"{BASE}.managers.forward_context", get_forward_context=lambda: context)
    loose.give(f"{BASE}.platforms", AttentionBackendEnum=Backends)
    loose.give(f"{BASE}.utils.precision", get_compute_dtype=lambda: torch.float64)
    loose.give(f"{BASE}.server_args", get_global_server_args=lambda: arguments)
    loose.give(f"{BASE}.layers.attention.selector", get_attn_backend=chosen)
    loose.give(
        "sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph",
        is_in_breakable_cuda_graph=lambda: False,
    )


def _call(layer: Any, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    return layer(q, k, v, gate_compress=gate)
