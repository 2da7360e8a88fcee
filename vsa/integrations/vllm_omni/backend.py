# SPDX-License-Identifier: Apache-2.0
"""vLLM-Omni's FASTVIDEO_VSA: attention of raster tokens, which it hands over as they are.

Its own class pads and gathers them for 256-token tiles, and goes over to dense attention, with one
warning, for short videos, grouped heads, a sequence that ranks share, and whatever its kernel
raises. Here a call is computed as asked, or refused in a sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor
from torch.nn import functional
from vllm_omni.diffusion.attention.backends.abstract import AttentionImpl, AttentionMetadata
from vllm_omni.diffusion.attention.backends.fastvideo_vsa import (
    FastVideoVSABackend,
    FastVideoVSAImpl,
)
from vllm_omni.diffusion.attention.backends.sdpa import SDPAImpl
from vllm_omni.diffusion.config import get_current_diffusion_config_or_none

from vsa.integrations.hosts import aside, raster

HOST = "vLLM-Omni"
TOPK = 64
BLOCK = (4, 8, 8)
H3_LAYER = "vllm_omni.diffusion.models.minimax_h3.attention.fastvideo_h3"
H3_TILE = (4, 4, 4)
KERNELS = "fastvideo_kernel"
SETTINGS = {"topk", "block_size"}
"""What a user's choice of the backend may hold; the rest is not taken in silence."""


class VsaBackend(FastVideoVSABackend):
    """The host's backend, with another implementation and without its kernel package.

    On GPUs that our kernels do not take it is the host's own, where that has its kernels.
    """

    @classmethod
    def validate_available(cls) -> None:
        """What the host asks before it makes a model; FastVideo's kernels are not needed."""
        if _steps_aside():
            super().validate_available()
            return
        _prepare_model()

    @staticmethod
    def get_impl_cls() -> type:
        """What makes a layer's attention.

        The host asks for it in every layer. It remembers by the size of heads alone that a backend
        is available, and does not ask again for a second model in the same process.
        """
        if _steps_aside():
            return FastVideoVSAImpl
        _prepare_model()
        return VsaImpl


def _prepare_model() -> None:
    """Refuse what no layer of this model could serve, and take MiniMax-H3's own class."""
    refuse_shared_keys()
    config = get_current_diffusion_config_or_none()
    if str(getattr(config, "model_class_name", None)).startswith("MiniMaxH3"):
        # Its layer brings a class of its own in the place of a backend's.
        import_module(H3_LAYER).MiniMaxH3VSAImpl.forward_cuda = forward_h3


def _steps_aside() -> bool:
    """Without FastVideo's kernels the host's class has none to stay on, and would be dense."""
    if find_spec(KERNELS) is None:
        return False
    return aside.steps_aside(HOST, "FASTVIDEO_VSA", FastVideoVSAImpl.__module__)


class VsaImpl(AttentionImpl):
    """Video Sparse Attention for the self-attention of a video, on tokens in raster order.

    Raises:
        ValueError: a setting that it cannot serve, in one sentence that names it.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
        qkv_layout: str | None = None,
        backend_kwargs: Mapping[str, Any] | None = None,
        role: str = "self",
        **others: Any,
    ) -> None:
        settings = backend_kwargs or {}
        if unknown := set(settings) - SETTINGS:
            raise ValueError(
                f"backend_kwargs may hold {sorted(SETTINGS)}, but it holds {sorted(unknown)}: a "
                "call is computed as asked or refused, never dense in its place"
            )
        self.topk = settings.get("topk", TOPK)
        if type(self.topk) is not int or self.topk < 1:
            raise ValueError(
                f"fastvideo_vsa_topk must be a whole number of at least 1, but it is {self.topk!r}"
            )
        block = settings.get("block_size", BLOCK)
        self.block_size = raster.extent("block_size", (block,) * 3 if type(block) is int else block)
        self.softmax_scale = softmax_scale
        self.causal = causal
        self.role = role
        self.dense = SDPAImpl(
            num_heads=num_heads,
            head_size=head_size,
            softmax_scale=softmax_scale,
            causal=causal,
            num_kv_heads=num_kv_heads,
            qkv_layout=qkv_layout,
        )

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        """The host's own refinements of the class that this one stands for pass as its own.

        A model that brings one (MiniMax-H3) is refused otherwise, before it is made.
        """
        return True if FastVideoVSAImpl in other.__mro__ else NotImplemented

    def forward_cuda(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_metadata: AttentionMetadata | None = None,
    ) -> Tensor:
        """(B, S, heads, head_dim) in raster order, padding after it as ``packed_padding`` says.

        Cross-attention, which has no tiles, is the host's dense attention.
        """
        if self.role == "cross" or query.shape[1] != key.shape[1]:
            return self.dense.forward(query, key, value, attn_metadata)
        extra = {} if attn_metadata is None else attn_metadata.extra
        if extra.get("vsa_dit_seq_shape") is None and self.role != "self":
            # A name of a model's own, which does not say that it attends a video.
            aside.warn_once(
                f"vsa: layers of the role {self.role!r} are dense with FASTVIDEO_VSA, because "
                "their metadata has no vsa_dit_seq_shape",
                FastVideoVSAImpl.__module__,
            )
            return self.dense.forward(query, key, value, attn_metadata)
        if extra.get("vsa_dit_seq_shape") is None:
            raise ValueError(
                "vsa_dit_seq_shape is missing in the metadata of this layer, so its grid is not "
                "known: choose FASTVIDEO_VSA for the roles of a model that gives it (Wan), by "
                "--diffusion-attention-config.per_role.self.backend"
            )
        assert attn_metadata is not None
        _refuse_masks(attn_metadata, self.causal)
        return _padded(
            query,
            key,
            value,
            extra.get("gate_compress"),
            attn_metadata,
            self.topk,
            extra["vsa_dit_seq_shape"],
            self.block_size,
            self.softmax_scale,
        )


def _refuse_masks(attn_metadata: AttentionMetadata, causal: bool) -> None:
    for name in ("attn_mask", "full_attn_spans"):
        if getattr(attn_metadata, name) is not None:
            raise ValueError(f"{name} must be None with FASTVIDEO_VSA, which has no masks")
    if causal:
        raise ValueError("causal must be False with FASTVIDEO_VSA, which has no causal mask")


def _real_length(attn_metadata: AttentionMetadata, length: int) -> int:
    """Tokens before the padding of a packed sequence."""
    packed = attn_metadata.packed_padding
    if packed is None:
        return length
    if packed.q_length != packed.kv_length:
        raise ValueError(
            f"packed_padding must have queries and keys of equal length with FASTVIDEO_VSA, but "
            f"has {packed.q_length} and {packed.kv_length}"
        )
    return min(int(packed.q_length), length)


def refuse_shared_keys() -> None:
    """Raises where no rank ever sees all keys of a head, or its queries are not all there."""
    config = get_current_diffusion_config_or_none()
    parallel = getattr(config, "parallel_config", None)
    for name in ("ring_degree", "allgather_degree"):
        if getattr(parallel, name, 1) > 1:
            raise ValueError(
                f"{name} must be 1 with FASTVIDEO_VSA, whose choice of tiles needs all keys of a "
                f"head at once: {HOST} would run its own attention, dense in a ring; use Ulysses"
            )


def forward_h3(
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_metadata: AttentionMetadata | None = None,
) -> Tensor:
    """In place of MiniMax-H3's ``forward_cuda``: segments and the video after them, as they lie.

    Calls without that layout, those of its text refiner, are the host's.
    """
    layout = import_module(H3_LAYER)._get_h3_layout(attn_metadata)
    if layout is None or attn_metadata is None:
        return FastVideoVSAImpl.forward_cuda(layer, query, key, value, attn_metadata)
    _refuse_masks(attn_metadata, layer.causal)
    segments, grid, start = layout
    if sum(segments) != start:
        raise ValueError(
            f"vsa_h3_prefix_segments must sum to {start}, where the video begins, but they are "
            f"{segments}, which is {sum(segments)}"
        )
    gate = attn_metadata.extra.get("gate_compress")
    return _padded(
        query,
        key,
        value,
        gate,
        attn_metadata,
        layer.topk,
        grid,
        H3_TILE,
        layer.softmax_scale,
        segments,
    )


def _padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    attn_metadata: AttentionMetadata,
    topk: int,
    grid: object,
    tile: tuple[int, int, int],
    scale: float,
    segments: tuple[int, ...] = (),
) -> Tensor:
    """Attention of the real tokens, and zeros for the padding after them."""
    length = query.shape[1]
    real = _real_length(attn_metadata, length)
    if gate is not None and real < length:
        gate = gate[:, :real]
    out = raster.attend(
        query[:, :real],
        key[:, :real],
        value[:, :real],
        topk,
        grid=raster.extent("vsa_dit_seq_shape", grid),
        tile=tile,
        gate=gate,
        segments=segments,
        scale=scale,
        named="vsa_dit_seq_shape",
    )
    return functional.pad(out, (0, 0, 0, 0, 0, length - real)) if real < length else out
