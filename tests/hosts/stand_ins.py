# SPDX-License-Identifier: Apache-2.0
"""Small programs of our own in the place of hosts, by their names, signatures and call forms.

CI has none of the hosts. ``facts.json`` says what they look like, test_facts.py holds these
classes to it, and run_host_layers.py runs the hosts' own.
"""

from __future__ import annotations

import abc
import enum
import importlib
import importlib.util
import math
import sys
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import vsa
from vsa.backends import BACKENDS
from vsa.integrations.hosts import aside

FASTVIDEO = "fastvideo.attention.backends.video_sparse_attn"
FASTVIDEO_H3 = "fastvideo.attention.backends.video_sparse_attn_h3"
FASTVIDEO_WORKERS = "fastvideo.worker.multiproc_executor"
SGLANG = "sglang.multimodal_gen.runtime"
SGLANG_VSA = f"{SGLANG}.layers.attention.backends.video_sparse_attn"
SGLANG_H3 = f"{SGLANG}.layers.attention.backends.vsa_h3_kernels"
OMNI = "vllm_omni.diffusion.attention.backends"


def put(monkeypatch: pytest.MonkeyPatch, name: str, **values: Any) -> ModuleType:
    """A module of that dotted name with these attributes, and the packages above it."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        path = ".".join(parts[:depth])
        if path not in sys.modules:
            module = ModuleType(path)
            module.__path__ = []
            module.__spec__ = ModuleSpec(path, None, is_package=True)
            monkeypatch.setitem(sys.modules, path, module)
            if depth > 1:
                vars(sys.modules[".".join(parts[: depth - 1])])[parts[depth - 1]] = module
    vars(sys.modules[name]).update(values)
    for value in values.values():
        if isinstance(value, type):
            value.__module__ = name
    return sys.modules[name]


def gpu(monkeypatch: pytest.MonkeyPatch, why_not: str | None) -> None:
    """A GPU of which our backend says that; nothing has been logged yet."""
    device = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: device)
    monkeypatch.setattr(BACKENDS["hopper"], "why_not", lambda request: why_not)
    monkeypatch.setattr(aside, "_said", set())


def wan_like(ranks: int = 1) -> dict[str, Any]:
    """The module of the VSA backend that FastVideo and SGLang have in common."""

    class VideoSparseAttentionImpl:
        def __init__(
            self,
            num_heads: int,
            head_size: int,
            causal: bool,
            softmax_scale: float,
            num_kv_heads: int | None = None,
            prefix: str = "",
            **extra_impl_args: Any,
        ) -> None:
            self.prefix, self.sp_size = prefix, ranks

        def preprocess_qkv(self, qkv: Tensor, attn_metadata: Any) -> Tensor:
            slots, length = slots_of(attn_metadata)
            tiled = qkv.new_zeros(qkv.shape[0], length, *qkv.shape[2:])
            tiled[:, slots] = qkv
            return tiled

        def forward(
            self,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            gate_compress: Tensor,
            attn_metadata: Any,
        ) -> Tensor:
            query, key, value, gate_compress = (
                x.transpose(1, 2).contiguous() for x in (query, key, value, gate_compress)
            )
            sizes = attn_metadata.variable_block_sizes
            kept = math.ceil((1 - attn_metadata.VSA_sparsity) * len(sizes))
            return vsa.video_sparse_attn(
                query,
                key,
                value,
                variable_block_sizes=sizes,
                topk=max(1, min(kept, len(sizes))),
                block_size=(4, 4, 4),
                compress_attn_weight=gate_compress,
            ).transpose(1, 2)

        def postprocess_output(self, output: Tensor, attn_metadata: Any) -> Tensor:
            return output[:, slots_of(attn_metadata)[0]]

    class VideoSparseAttentionBackend:
        @staticmethod
        def get_impl_cls() -> type:
            return VideoSparseAttentionImpl

    return {
        "VSA_TILE_SIZE": (4, 4, 4),
        "VideoSparseAttentionImpl": VideoSparseAttentionImpl,
        "VideoSparseAttentionBackend": VideoSparseAttentionBackend,
    }


def metadata(grid: tuple[int, int, int], sparsity: float) -> SimpleNamespace:
    """What the builder of these hosts makes, as far as a layer reads it."""
    sizes = vsa.Grid(grid).sizes.to(torch.int32)
    return SimpleNamespace(
        dit_seq_shape=list(grid), VSA_sparsity=sparsity, variable_block_sizes=sizes
    )


def slots_of(meta: Any) -> tuple[Tensor, int]:
    """The slot of every token, the real ones first in their tile, and how many slots there are."""
    tiles = vsa.Grid(tuple(meta.dit_seq_shape)).tile_of_token()
    order = torch.argsort(tiles, stable=True)
    first = torch.cumsum(meta.variable_block_sizes, 0) - meta.variable_block_sizes
    slots = torch.empty_like(order)
    slots[order] = tiles[order] * 64 + torch.arange(len(order)) - first[tiles[order]]
    return slots, 64 * len(first)


class Layer:
    """The calls of DistributedAttention_VSA (FastVideo) and UlyssesAttention_VSA (SGLang)."""

    def __init__(
        self, host: str, module: ModuleType, heads: int, head_size: int, **more: Any
    ) -> None:
        made = dict(num_heads=heads, head_size=head_size, causal=False, num_kv_heads=heads)
        made |= dict(softmax_scale=head_size**-0.5, prefix="blocks.0.impl") | more
        self.host = host
        self.attn_impl = module.VideoSparseAttentionBackend.get_impl_cls()(**made)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, meta: Any) -> Tensor:
        stack = [x for x in (q, k, v, gate) if x is not None]
        parts = [*self.attn_impl.preprocess_qkv(torch.cat(stack), meta).chunk(len(stack))]
        parts += [None] * (4 - len(stack))
        if self.host == "sglang":
            named = dict(gate_compress=parts[3], attn_metadata=meta)
            out = self.attn_impl.forward(*parts[:3], **named)
        else:
            out = self.attn_impl.forward(*parts, meta)
        return self.attn_impl.postprocess_output(out, meta)


def kernels() -> dict[str, dict[str, Any]]:
    """fastvideo_kernel, whose functions say which of them was called."""

    def function(name: str) -> Any:
        return lambda *_, **__: name

    names = {
        "": ["video_sparse_attn", "video_sparse_attn_bshd", "block_sparse_attn"],
        ".ops": ["video_sparse_attn", "video_sparse_attn_bshd"],
        ".block_sparse_attn": ["block_sparse_attn", "block_sparse_attn_from_indices"],
        ".block_sparse_attn_256": ["block_sparse_attn_256_bshd"],
    }
    return {
        f"fastvideo_kernel{module}": {name: function(name) for name in of}
        for module, of in names.items()
    }


def h3_like() -> dict[str, Any]:
    """FastVideo's module of MiniMax-H3, and what SGLang's has in common with it."""

    class MiniMaxH3VSAImpl:
        def __init__(
            self,
            num_heads: int,
            head_size: int,
            causal: bool,
            softmax_scale: float,
            num_kv_heads: int | None = None,
            prefix: str = "",
            **extra_impl_args: Any,
        ) -> None:
            self.layer_idx = int(prefix or -1)

        def preprocess_qkv(self, qkv: Tensor, attn_metadata: Any) -> Tensor:
            raise AssertionError("tokens are gathered into tiles")

        postprocess_output = preprocess_qkv

        def forward(
            self, query: Any, key: Any, value: Any, gate_compress: Any, attn_metadata: Any
        ) -> Tensor:
            raise AssertionError("the host's own")

    class MiniMaxH3VSAMetadataBuilder:
        def build(
            self,
            current_timestep: int,
            raw_latent_shape: Any,
            patch_size: Any,
            VSA_sparsity: float,
            prefix_segments: Any,
            device: Any,
            exempt: bool = True,
            dense_layers: tuple[int, ...] = (),
            tile_size: int = 256,
            **kwargs: Any,
        ) -> Any:
            return SimpleNamespace(
                VSA_sparsity=VSA_sparsity, dense_layers=dense_layers, exempt=exempt
            )

    class MiniMaxH3VSABackend:
        @staticmethod
        def get_impl_cls() -> type:
            return MiniMaxH3VSAImpl

    MiniMaxH3VSAMetadataBuilder.build.__module__ = FASTVIDEO_H3
    return {
        "VSA_H3_TILE_SHAPES": {64: (4, 4, 4), 256: (4, 8, 8)},
        "MiniMaxH3VSAImpl": MiniMaxH3VSAImpl,
        "MiniMaxH3VSAMetadataBuilder": MiniMaxH3VSAMetadataBuilder,
        "MiniMaxH3VSABackend": MiniMaxH3VSABackend,
    }


class WorkerMultiprocProc:
    """FastVideo's worker process."""

    @staticmethod
    def worker_main(*args: Any, **kwargs: Any) -> Any:
        backend = sys.modules[FASTVIDEO].VideoSparseAttentionBackend
        return backend.get_impl_cls().__name__, args, kwargs


class HookType(enum.Enum):
    """Kinds of hooks of SGLang."""

    BEFORE = "before"
    AFTER = "after"
    AROUND = "around"
    REPLACE = "replace"


class HookRegistry:
    """What SGLang's registry does with the two kinds that we use."""

    hooks: list[tuple[str, Any, HookType]] = []  # noqa: RUF012  the class is the registry

    @classmethod
    def register(
        cls, target: str, hook: Any, hook_type: HookType = HookType.AFTER, *, source: Any = None
    ) -> None:
        cls.hooks.append((target, hook, hook_type))

    @classmethod
    def apply_hooks(cls) -> None:
        for target, hook, kind in cls.hooks:
            owner, name = _owner(target)
            theirs = vars(owner)[name]
            still = isinstance(theirs, staticmethod)
            plain = theirs.__func__ if still else theirs
            new = _around(hook, plain) if kind is HookType.AROUND else hook
            setattr(owner, name, staticmethod(new) if still else new)


def _owner(target: str) -> tuple[Any, str]:
    *path, name = target.split(".")
    for depth in range(len(path), 0, -1):
        module = ".".join(path[:depth])
        if module in sys.modules:
            owner: Any = importlib.import_module(module)
            for attribute in path[depth:]:
                owner = getattr(owner, attribute)
            return owner, name
    raise ImportError(target)


def _around(hook: Any, theirs: Any) -> Any:
    return lambda *args, **keywords: hook(theirs, *args, **keywords)


@dataclass
class AttentionMetadata:
    """Fields of vLLM-Omni's that a VSA layer reads."""

    attn_mask: Any = None
    extra: dict[str, Any] = field(default_factory=dict)
    full_attn_spans: Any = None
    video_layout: Any = None
    packed_padding: Any = None


class AttentionImpl(abc.ABC):
    """vLLM-Omni's base, which asks its platform where to go on."""

    @abc.abstractmethod
    def __init__(self, **settings: Any) -> None:
        raise NotImplementedError

    def forward(self, query: Any, key: Any, value: Any, attn_metadata: Any = None) -> Tensor:
        return self.forward_cuda(query, key, value, attn_metadata)

    def forward_cuda(self, query: Any, key: Any, value: Any, attn_metadata: Any = None) -> Tensor:
        raise NotImplementedError


class FastVideoVSAImpl(AttentionImpl):
    """vLLM-Omni's own implementation."""


class MiniMaxH3VSAImpl(FastVideoVSAImpl):
    """A refinement that one of its models brings."""


class FastVideoVSABackend:
    """vLLM-Omni's own backend."""

    @classmethod
    def validate_available(cls) -> None:
        if importlib.util.find_spec("fastvideo_kernel") is None:
            raise ImportError("FASTVIDEO_VSA requires the optional fastvideo-kernel package")

    @staticmethod
    def get_name() -> str:
        return "FASTVIDEO_VSA"


class SDPAImpl(AttentionImpl):
    """Dense attention, which says that it ran."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def forward_cuda(self, query: Any, key: Any, value: Any, attn_metadata: Any = None) -> Any:
        return "dense"


def omni(monkeypatch: pytest.MonkeyPatch, config: Any = None) -> Any:
    """vLLM-Omni with its registry; returns the module of our backend, imported in it."""
    slot = SimpleNamespace(name="FASTVIDEO_VSA")
    chosen: dict[Any, str] = {}
    put(
        monkeypatch,
        f"{OMNI}.registry",
        DiffusionAttentionBackendEnum=SimpleNamespace(FASTVIDEO_VSA=slot),
        register_diffusion_backend=lambda backend, class_path=None: chosen.update(
            {backend.name: class_path}
        ),
        chosen=chosen,
    )
    put(monkeypatch, f"{OMNI}.sdpa", SDPAImpl=SDPAImpl)
    put(
        monkeypatch,
        f"{OMNI}.fastvideo_vsa",
        FastVideoVSABackend=FastVideoVSABackend,
        FastVideoVSAImpl=FastVideoVSAImpl,
    )
    put(
        monkeypatch,
        f"{OMNI}.abstract",
        AttentionImpl=AttentionImpl,
        AttentionMetadata=AttentionMetadata,
    )
    put(
        monkeypatch,
        "vllm_omni.diffusion.config",
        get_current_diffusion_config_or_none=lambda: config,
    )
    monkeypatch.delitem(sys.modules, "vsa.integrations.vllm_omni.backend", raising=False)
    module = importlib.import_module("vsa.integrations.vllm_omni.backend")
    monkeypatch.setitem(sys.modules, "vsa.integrations.vllm_omni.backend", module)
    return module
