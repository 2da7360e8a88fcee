# SPDX-License-Identifier: Apache-2.0
"""MiniMax-H3's layers of FastVideo and SGLang: segments and a video, in raster order."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hosts import reference, stand_ins
from hosts.stand_ins import FASTVIDEO, FASTVIDEO_H3
from hosts.wan_layers import HEAD_DIM, HEADS, error, tensors

from vsa.integrations import fastvideo, sglang
from vsa.integrations.hosts import aside, packed, raster

SEGMENTS, GRID = (70, 20), (5, 9, 10)
LENGTH = sum(SEGMENTS) + math.prod(GRID)
LIMIT = 1e-12


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    for module, functions in stand_ins.kernels().items():
        stand_ins.put(monkeypatch, module, **functions)
    stand_ins.put(monkeypatch, FASTVIDEO, **stand_ins.wan_like())
    workers = stand_ins.WorkerMultiprocProc
    stand_ins.put(monkeypatch, stand_ins.FASTVIDEO_WORKERS, WorkerMultiprocProc=workers)
    yield stand_ins.put(monkeypatch, FASTVIDEO_H3, **stand_ins.h3_like())
    fastvideo.uninstall()


def built(host: ModuleType, tile_size: int = 64, **more: Any) -> Any:
    given = dict(current_timestep=0, raw_latent_shape=(5, 18, 20), patch_size=(1, 2, 2))
    given |= dict(VSA_sparsity=0.8, prefix_segments=(70, 0, 20), device=None) | more
    return host.MiniMaxH3VSAMetadataBuilder().build(tile_size=tile_size, **given)


def tiles_of(tile: tuple[int, int, int]) -> tuple[torch.Tensor, int]:
    video = reference.video_tiles(GRID, tile)
    return reference.packed_tiles(SEGMENTS, video, math.prod(tile))


@pytest.mark.parametrize(("size", "tile"), [(64, (4, 4, 4)), (256, (4, 8, 8))])
@pytest.mark.parametrize("gated", [False, True])
def test_a_layer_of_fastvideo(
    host: ModuleType, size: int, tile: tuple[int, int, int], gated: bool
) -> None:
    fastvideo.install()
    made = host.MiniMaxH3VSABackend.get_impl_cls()(HEADS, HEAD_DIM, False, 0.25, prefix="3")
    x = tensors(LENGTH)[: 3 + gated]
    tiles, before = tiles_of(tile)
    for more, sparsity in (({}, 0.8), ({"dense_layers": (3,)}, 0.0)):
        meta = built(host, size, **more)
        stack = made.preprocess_qkv(torch.cat(x), meta).chunk(len(x))
        out = made.forward(*stack[:3], stack[3] if gated else None, meta)
        out = made.postprocess_output(out, meta)
        topk = raster.tiles_kept(sparsity, raster.tiles_of(GRID, tile))
        right = reference.attention(*x[:3], tiles, topk, x[3] if gated else None, before)
        assert error(out, right) < LIMIT


def test_a_layer_of_sglang_with_padding_and_the_coarse_output_apart(host: ModuleType) -> None:
    meta = packed.build(
        host.MiniMaxH3VSAMetadataBuilder.build,
        None,
        0,
        GRID,
        (1, 1, 1),
        0.8,
        SEGMENTS,
        None,
        tile_size=64,
    )
    meta.total_seq_length, meta.blocks_per_tile = LENGTH, 1
    layer = SimpleNamespace(layer_idx=0)
    x = [each[:1] for each in tensors(LENGTH)]
    rows = [torch.nn.functional.pad(each[0], (0, 0, 0, 0, 0, 4), value=9.0) for each in x]
    call: dict[str, Any] = dict(
        cu_seqlens=None, max_seqlen=LENGTH, cu_seqlens_host=(0, LENGTH, LENGTH + 4)
    )
    tiles, before = tiles_of((4, 4, 4))
    topk = raster.tiles_kept(0.8, raster.tiles_of(GRID, (4, 4, 4)))
    right = reference.attention(*x[:3], tiles, topk, x[3], before)[0]
    given = dict(attn_metadata=meta, **call)
    out = packed.sglang_forward(_theirs, layer, *rows[:3], gate_compress=rows[3], **given)
    assert error(out[:LENGTH], right) < LIMIT and out[LENGTH:].abs().sum() == 0
    out, coarse = packed.sglang_forward(_theirs, layer, *rows[:3], return_compress=True, **given)
    gated = out[:LENGTH] + x[3][0] * coarse[:, tiles].transpose(0, 1)
    assert error(gated, right) < LIMIT
    assert packed.sglang_forward(_theirs, layer, *rows[:3], **call) == "theirs"
    other = SimpleNamespace(layer_idx=None)
    assert packed.sglang_forward(_theirs, other, *rows[:3], **given) == "theirs"
    with pytest.raises(ValueError, match="gate_compress must be None with return_compress"):
        packed.sglang_forward(
            _theirs, layer, *rows[:3], gate_compress=rows[3], return_compress=True, **given
        )
    meta.total_seq_length = LENGTH - 1
    unknown = dict(cu_seqlens=torch.tensor([0, LENGTH, LENGTH + 4]), cu_seqlens_host=None)
    for ends in ({}, unknown):
        with pytest.raises(ValueError, match=f"cu_seqlens must end the sequence at {LENGTH - 1}"):
            packed.sglang_forward(_theirs, layer, *rows[:3], **(given | ends))


def _theirs(*_: Any, **__: Any) -> str:
    return "theirs"


INTERLEAVED = (70, (3, 5, 9), 20, (1, 4, 9), 30, GRID)
"""Two reference videos among segments, as Ref2VA packs them."""


def built_by_sglang(uses_regions: bool = True, **given: Any) -> Any:
    """By a builder like SGLang's, which takes reference videos, in ``packed_segments``."""

    def build(
        raw_latent_shape: Any,
        patch_size: Any,
        VSA_sparsity: float,
        prefix_segments: Any,
        exempt: bool = True,
        packed_segments: Any = None,
        tile_size: int = 64,
        ref_keep_rate: float | None = None,
    ) -> SimpleNamespace:
        return SimpleNamespace(
            VSA_sparsity=VSA_sparsity,
            dense_layers=(3,),
            uses_regions=uses_regions,
            total_seq_length=0,
            blocks_per_tile=tile_size // 64,
        )

    build.__module__ = FASTVIDEO_H3
    return packed.build(build, GRID, (1, 1, 1), **({"prefix_segments": SEGMENTS} | given))


@pytest.mark.parametrize(("size", "tile"), [(64, (4, 4, 4)), (256, (4, 8, 8))])
def test_reference_videos_have_budgets_of_their_own(
    host: ModuleType, size: int, tile: tuple[int, int, int]
) -> None:
    tiles, before, spans = reference.mixed_tiles(INTERLEAVED, tile)
    length = len(tiles)
    x = [each[:1] for each in tensors(length)]
    rows = [torch.nn.functional.pad(each[0], (0, 0, 0, 0, 0, 4), value=9.0) for each in x]
    call: dict[str, Any] = dict(
        cu_seqlens=None, max_seqlen=length, cu_seqlens_host=(0, length, length + 4)
    )
    for sparsity, layer in ((0.8, 0), (0.8, 3), (0.0, 0)):
        meta = built_by_sglang(
            VSA_sparsity=sparsity,
            packed_segments=(70, (3, 5, 9), 0, 20, (1, 4, 9), 30, GRID),
            ref_keep_rate=0.3,
            tile_size=size,
        )
        meta.total_seq_length = length
        own = [0.7, 0.7, 0.8] if (sparsity, layer) == (0.8, 0) else [0.0] * 3
        counts = [
            raster.tiles_kept(each, last - first)
            for each, (first, last) in zip(own, spans, strict=True)
        ]
        right = reference.attention(
            *x[:3],
            tiles,
            0,
            x[3],
            choose=lambda scores, counts=counts: reference.regions(scores, before, spans, counts),
        )[0]
        given = dict(attn_metadata=meta, **call)
        made = SimpleNamespace(layer_idx=layer)
        out = packed.sglang_forward(_theirs, made, *rows[:3], gate_compress=rows[3], **given)
        assert error(out[:length], right) < LIMIT and out[length:].abs().sum() == 0
        out, coarse = packed.sglang_forward(_theirs, made, *rows[:3], return_compress=True, **given)
        gated = out[:length] + x[3][0] * coarse[:, tiles * (size // 64)].transpose(0, 1)
        assert error(gated, right) < LIMIT


@pytest.mark.parametrize(("size", "tile"), [(64, (4, 4, 4)), (256, (4, 8, 8))])
def test_segments_compete_with_the_video_for_its_budget(
    host: ModuleType, size: int, tile: tuple[int, int, int]
) -> None:
    fastvideo.install()
    made = host.MiniMaxH3VSABackend.get_impl_cls()(HEADS, HEAD_DIM, False, 0.25, prefix="3")
    x = tensors(LENGTH)
    tiles, before = tiles_of(tile)
    videos = raster.tiles_of(GRID, tile)
    for more, sparsity in (({}, 0.8), ({}, 0.0), ({"dense_layers": (3,)}, 0.0)):
        meta = built(host, size, exempt=False, VSA_sparsity=0.8 if more else sparsity, **more)
        topk = raster.tiles_kept(sparsity, videos)
        right, kept = (
            reference.attention(
                *x[:3],
                tiles,
                0,
                x[3],
                choose=lambda scores, rule=rule, topk=topk: rule(scores, topk, before),
            )
            for rule in (reference.compete, reference.exempt)
        )
        assert error(made.forward(*x, meta), right) < LIMIT
        assert (error(right, kept) > 1e-3) == (sparsity > 0)  # the rules differ on these numbers


def test_segments_are_kept_where_the_host_keeps_them_whatever_is_asked(
    host: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """SGLang's larger tiles know no competing segments, which it does not say."""
    monkeypatch.setattr(aside, "_said", set())
    for exempt in (True, False):
        meta = built_by_sglang(VSA_sparsity=0.8, exempt=exempt, tile_size=256)
        assert (meta.vsa_packing.sparse, len(caplog.records)) == (None, int(not exempt))
    assert "vsa_mode='compete' changes nothing with tiles of 256 tokens" in caplog.text
    assert built_by_sglang(False, VSA_sparsity=0.8, exempt=False).vsa_packing.sparse is not None


def test_what_is_not_as_the_builder_was_told_is_refused(host: ModuleType) -> None:
    fastvideo.install()
    made = host.MiniMaxH3VSABackend.get_impl_cls()(HEADS, HEAD_DIM, False, 0.25)
    with pytest.raises(ValueError, match="causal must be False: FastVideo"):
        type(made)(HEADS, HEAD_DIM, True, 0.25)
    with pytest.raises(ValueError, match="softmax_scale must be head_size"):
        type(made)(HEADS, HEAD_DIM, False, 1.0)
    q, k, v = tensors(LENGTH, 3)
    with pytest.raises(ValueError, match="attn_metadata was made by another builder"):
        made.forward(q, k, v, None, SimpleNamespace())
    with pytest.raises(ValueError, match=r"and of segments \(70, 20\) before them, but its shape"):
        made.forward(q[:, 1:], k, v, None, built(host))
    with pytest.raises(ValueError, match=r"the segments of its grid have 540: 70 \+ 20 \+ 5\*9"):
        made.forward(q[:, 1:], k, v, None, built(host, exempt=False))


def test_the_plugin_hooks_builder_and_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand_ins.HookRegistry, "hooks", [])
    stand_ins.put(
        monkeypatch,
        "sglang.multimodal_gen.runtime.platforms.plugins",
        HookRegistry=stand_ins.HookRegistry,
        HookType=stand_ins.HookType,
    )
    sglang.h3_plugin()
    kinds = {target: (hook, kind.name) for target, hook, kind in stand_ins.HookRegistry.hooks}
    assert kinds == {
        sglang.H3_BUILD: (sglang._h3_build, "AROUND"),
        sglang.H3_LAYER: (sglang._h3_class, "AROUND"),
    }


class SglangLayer:
    """As SGLang makes a layer of MiniMax-H3; without an index it attends text alone."""

    def __init__(
        self, num_heads: int, head_size: int, causal: bool, softmax_scale: float, prefix: str = ""
    ) -> None:
        self.layer_idx = int(prefix) if prefix else None

    def forward_varlen(self, *_: Any, **__: Any) -> str:
        return "theirs"


def test_sglangs_class_of_minimax_h3_is_ours_on_hopper_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = sglang._h3_class(lambda: SglangLayer)(HEADS, HEAD_DIM, False, 0.25, prefix="0")
    assert isinstance(made, SglangLayer) and type(made) is not SglangLayer
    with pytest.raises(ValueError, match="attn_metadata was made by another builder"):
        made.forward_varlen(
            *tensors(LENGTH, 3),
            cu_seqlens=None,
            max_seqlen=LENGTH,
            cu_seqlens_host=(0, LENGTH),
            attn_metadata=SimpleNamespace(total_seq_length=LENGTH),
        )
    with pytest.raises(ValueError, match="softmax_scale must be head_size"):
        sglang._h3_class(lambda: SglangLayer)(HEADS, HEAD_DIM, False, 1.0, prefix="0")
    assert sglang._h3_class(lambda: SglangLayer)(HEADS, HEAD_DIM, True, 1.0).layer_idx is None
    stand_ins.gpu(monkeypatch, "it is another GPU")
    for _ in range(2):
        assert sglang._h3_class(lambda: SglangLayer) is SglangLayer
    (record,) = [each for each in caplog.records if each.levelname == "WARNING"]
    assert record.getMessage() == (
        "vsa: VIDEO_SPARSE_ATTN_H3 of SGLang stays on SGLang's own kernel, because backend "
        "'hopper' cannot run on this device (it is another GPU); vsa info says more"
    )


def test_metadata_stays_sglangs_own_where_its_layers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a layout that we know nothing of, which its own layers may take one day."""

    def build(raw_latent_shape: Any, patch_size: Any, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(VSA_sparsity=0.5)

    unknown = dict(raw_latent_shape=(0, 4, 4), patch_size=(1, 1, 1), prefix_segments=())
    with pytest.raises(ValueError, match="raw_latent_shape over patch_size must be three token"):
        sglang._h3_build(build, **unknown, tile_size=64, exempt=True)
    stand_ins.gpu(monkeypatch, "it is another GPU")
    assert vars(sglang._h3_build(build, **unknown)) == {"VSA_sparsity": 0.5}


@pytest.mark.parametrize("exempt", [True, False])
@torch._dynamo.config.patch(recompile_limit=1)
def test_layers_share_a_compiled_graph(host: ModuleType, exempt: bool) -> None:
    """FastVideo compiles the block that all layers have in common, as one graph or not at all.

    Each step has metadata of its own.
    """
    torch._dynamo.reset()
    fastvideo.install()
    made = host.MiniMaxH3VSABackend.get_impl_cls()
    x = tensors(LENGTH, 3)

    @torch.compile(fullgraph=True, backend="eager")
    def block(layer: Any, meta: Any, *given: Any) -> Any:
        return layer.forward(*given, None, meta)

    for index in range(3):
        layer = made(HEADS, HEAD_DIM, False, 0.25, prefix=str(index))
        meta = built(host, exempt=exempt)
        assert torch.equal(block(layer, meta, *x), layer.forward(*x, None, meta))
