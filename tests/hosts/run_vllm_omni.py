# SPDX-License-Identifier: Apache-2.0
"""vLLM-Omni's own FASTVIDEO_VSA, with our kernels below, and the class that takes its place."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from hosts import loose, reference, wheels
from hosts.wan_layers import HEAD_DIM, HEADS, Found, error, tensors
from torch import Tensor

from vsa.integrations import vllm_omni
from vsa.integrations.hosts import lists

BASE = "vllm_omni.diffusion.attention"
REAL = {
    f"{BASE}.backends.abstract",
    f"{BASE}.backends.fastvideo_vsa",
    f"{BASE}.backends.registry",
    f"{BASE}.backends.sdpa",
    f"{BASE}.ops.block_sparse",
    "vllm_omni.diffusion.models.minimax_h3.attention.fastvideo_h3",
}
GRID, SEGMENTS = (5, 18, 11), (70, 20, 64)
SHAPE = dict(num_heads=HEADS, head_size=HEAD_DIM, softmax_scale=HEAD_DIM**-0.5)
HALF = 2e-2
"""The host's layers take bf16 and fp16 alone, and these inputs are bf16."""


def run(folder: Path) -> Iterator[Found]:
    """Wan's layer and MiniMax-H3's."""
    root = wheels.fetch("vllm-omni", "0.30.0", folder)
    packages = {"vllm_omni", "vllm", "fastvideo_kernel"}
    with loose.Only(root, packages, REAL):
        _make_ready()
        vllm_omni.plugin()
        registry = importlib.import_module(f"{BASE}.backends.registry")
        ours = registry.DiffusionAttentionBackendEnum.FASTVIDEO_VSA.get_class()
        yield from _wan(ours.get_impl_cls())
        yield from _h3(ours.get_impl_cls(), "their maps, our kernel")
        ours.validate_available()  # as the host does before it makes a model
        yield from _h3(ours.get_impl_cls(), "by the plugin")


def _make_ready() -> None:
    """A CUDA platform in name, one rank, and FastVideo's functions by ours."""
    platform = SimpleNamespace(is_cuda=lambda: True, is_rocm=lambda: False)
    loose.give("vllm_omni.platforms", current_omni_platform=platform)
    loose.give("vllm_omni.diffusion.forward_context", is_forward_context_available=lambda: False)
    config = SimpleNamespace(model_class_name="MiniMaxH3Pipeline", parallel_config=None)
    loose.give("vllm_omni.diffusion.config", get_current_diffusion_config_or_none=lambda: config)
    loose.give("vllm.utils.import_utils", resolve_obj_by_qualname=_resolve)
    loose.give(
        f"{BASE}.backends.utils.attn_runtime_selector", can_sdpa_use_fused_gqa=lambda *_: True
    )
    for name, functions in lists.PROVIDED.items():
        loose.give(name, **functions)


def _resolve(path: str) -> Any:
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def _wan(ours: Any) -> Iterator[Found]:
    abstract = importlib.import_module(f"{BASE}.backends.abstract")
    theirs = importlib.import_module(f"{BASE}.backends.fastvideo_vsa").FastVideoVSAImpl

    class OnAnyDevice(theirs):  # type: ignore[misc]
        """The host's layer without its question whether the tensors are on a GPU."""

        def _fallback_reason(self, *_: Any) -> None:
            return None

        def _fallback(self, *arguments: Any) -> Tensor:
            raise SystemExit(f"the host's layer went over to dense attention: {arguments[-1]}")

    length = GRID[0] * GRID[1] * GRID[2]
    tiles = reference.video_tiles(GRID, (4, 8, 8))
    for padding in (0, 30):
        q, k, v, gate = (x.bfloat16() for x in tensors(length + padding))
        for given in (None, gate):
            meta = abstract.AttentionMetadata(extra={"vsa_dit_seq_shape": GRID})
            if given is not None:
                meta.extra["gate_compress"] = given
            if padding:
                meta.packed_padding = abstract.PackedPaddingMetadata(length, length, None, None)
            real = [None if x is None else x[:, :length] for x in (q, k, v, given)]
            right = reference.attention(*real[:3], tiles, 3, real[3])
            right = torch.nn.functional.pad(right, (0, 0, 0, 0, 0, padding))
            for name, impl in (("their padding, our kernel", OnAnyDevice), ("by the plugin", ours)):
                made = impl(**SHAPE, backend_kwargs={"topk": 3})
                out = made.forward(q, k, v, meta)
                gated = "no gate" if given is None else "gate"
                yield Found(f"Wan, {name}, {gated}, padding {padding}", error(out, right), HALF)


def _h3(ours: Any, path: str) -> Iterator[Found]:
    abstract = importlib.import_module(f"{BASE}.backends.abstract")
    name = "vllm_omni.diffusion.models.minimax_h3.attention.fastvideo_h3"
    layer = importlib.import_module(name).MiniMaxH3VSAImpl
    if not issubclass(layer, ours):
        raise SystemExit("the host refuses its MiniMax-H3 layer beside our class")
    grid, video = (5, 12, 10), (3, 5, 9)
    # It cuts reference videos like text: runs of tokens of one kind, which all rows keep.
    for reference_at, segments in ((None, SEGMENTS), (70, (70, math.prod(video), 24))):
        start = sum(segments)
        length = start + math.prod(grid)
        q, k, v, gate = (x.bfloat16() for x in tensors(length))
        spans = [abstract.VideoTokenSpan(start, grid, "target")]
        if reference_at is not None:
            spans.insert(0, abstract.VideoTokenSpan(reference_at, video, "reference"))
        meta = abstract.AttentionMetadata(
            extra={"vsa_h3_prefix_segments": segments, "gate_compress": gate},
            video_layout=abstract.VideoTokenLayout(used_len=length, video_spans=tuple(spans)),
        )
        made = layer(**SHAPE, backend_kwargs={"topk": 4, "fallback_on_error": False})
        tiles, before = reference.packed_tiles(segments, reference.video_tiles(grid, (4, 4, 4)), 64)
        right = reference.attention(q, k, v, tiles, 4, gate, before)
        out = made.forward(q, k, v, meta)
        kind = "" if reference_at is None else ", a reference"
        yield Found(f"MiniMax-H3, {path}{kind}", error(out, right), HALF)
