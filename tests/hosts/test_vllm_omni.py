# SPDX-License-Identifier: Apache-2.0
"""vLLM-Omni's slot FASTVIDEO_VSA by ``vsa.attention``: as asked, or a sentence, never dense."""

from __future__ import annotations

import importlib
import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hosts import reference, stand_ins
from hosts.wan_layers import HEAD_DIM, HEADS, error, tensors

import vsa
from vsa.integrations import vllm_omni
from vsa.integrations.hosts import aside

GRID = (5, 9, 18)
LIMIT = 1e-12


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    return stand_ins.omni(monkeypatch)


def made(backend: Any, **more: Any) -> Any:
    settings = dict(num_heads=HEADS, head_size=HEAD_DIM, softmax_scale=HEAD_DIM**-0.5)
    settings |= dict(causal=False, num_kv_heads=HEADS, qkv_layout=None, prefix="blocks.0")
    settings |= dict(backend_kwargs={"topk": 3}, role="self", backend_explicit=True) | more
    return backend.VsaBackend.get_impl_cls()(**settings)


def meta(gate: Any = None, **more: Any) -> stand_ins.AttentionMetadata:
    extra = {"vsa_dit_seq_shape": GRID} | ({} if gate is None else {"gate_compress": gate})
    return stand_ins.AttentionMetadata(extra=extra, **more)


def test_the_plugin_takes_the_slot(backend: Any) -> None:
    vllm_omni.plugin()
    vllm_omni.plugin()  # hosts load plugins in every process, and more than once
    chosen = importlib.import_module(f"{stand_ins.OMNI}.registry").chosen
    module, name = chosen["FASTVIDEO_VSA"].rsplit(".", 1)
    found = getattr(importlib.import_module(module), name)
    assert found is backend.VsaBackend and found.get_name() == "FASTVIDEO_VSA"
    found.validate_available()


def test_the_hosts_own_class_stays_on_other_gpus(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where it has its kernels; without them it would be dense, and ours is not."""
    parallel = SimpleNamespace(ring_degree=2)  # which is refused of ours alone
    config = SimpleNamespace(model_class_name="MiniMaxH3Pipeline", parallel_config=parallel)
    backend = stand_ins.omni(monkeypatch, config)
    stand_ins.gpu(monkeypatch, "it is another GPU")
    for asked in (backend.VsaBackend.get_impl_cls, backend.VsaBackend.validate_available):
        with pytest.raises(ValueError, match="ring_degree must be 1"):
            asked()
    assert not caplog.records
    for module, functions in stand_ins.kernels().items():
        stand_ins.put(monkeypatch, module, **functions)
    for _ in range(2):  # MiniMax-H3's own layer, which is not there, is not asked for
        backend.VsaBackend.validate_available()
        assert backend.VsaBackend.get_impl_cls() is stand_ins.FastVideoVSAImpl
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.name == stand_ins.FastVideoVSAImpl.__module__
    assert record.getMessage().startswith(
        "vsa: FASTVIDEO_VSA of vLLM-Omni stays on vLLM-Omni's own kernel, because backend 'hopper' "
    )
    stand_ins.gpu(monkeypatch, None)
    parallel.ring_degree, config.model_class_name = 1, "WanPipeline"
    assert backend.VsaBackend.get_impl_cls() is backend.VsaImpl


@pytest.mark.parametrize("tile", [(4, 8, 8), (4, 4, 4)])
@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("gated", [False, True])
def test_a_call_is_attention_over_its_tiles(
    backend: Any, tile: tuple[int, int, int], padding: int, gated: bool
) -> None:
    """Without a gate there is no coarse output, unlike in FastVideo's kernels."""
    length = math.prod(GRID)
    q, k, v, gate = tensors(length)
    padded = [
        torch.nn.functional.pad(x, (0, 0, 0, 0, 0, padding), value=1e9) for x in (q, k, v, gate)
    ]
    packed = SimpleNamespace(q_length=length, kv_length=length) if padding else None
    given = meta(padded[3] if gated else None, packed_padding=packed)
    settings = {"topk": 3, "block_size": tile}
    out = made(backend, backend_kwargs=settings).forward(*padded[:3], given)
    tiles = reference.video_tiles(GRID, tile)
    right = reference.attention(q, k, v, tiles, 3, gate if gated else None)
    assert error(out[:, :length], right) < LIMIT and out[:, length:].abs().sum() == 0


@pytest.mark.filterwarnings("ignore:topk is 64, but there are")  # once in a process
def test_settings_of_a_call_count(backend: Any) -> None:
    """Grouped heads, a scale of its own, and more tiles than there are."""
    q, _, _ = tensors(math.prod(GRID), 3, heads=4)
    _, k, v = tensors(math.prod(GRID), 3, heads=2)
    layer = made(backend, num_heads=4, num_kv_heads=2, softmax_scale=0.1, backend_kwargs=None)
    out = layer.forward(q, k, v, meta())
    wide = [x.repeat_interleave(2, dim=2) for x in (k, v)]
    tiles = reference.video_tiles(GRID, (4, 8, 8))
    assert error(out, reference.attention(q, *wide, tiles, 64, None, scale=0.1)) < LIMIT


def test_what_is_no_self_attention_is_the_hosts_dense_one(
    backend: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    q, k, _ = tensors(math.prod(GRID), 3)
    assert made(backend, role="cross").forward(q, q, q, None) == "dense"
    assert made(backend).forward(q, k[:, :7], k[:, :7], meta()) == "dense"
    roles = "joint", "ltx2.video"  # names of a model's own, which say nothing
    monkeypatch.setattr(aside, "_said", set())
    for role in roles:
        assert made(backend, role=role).forward(q, k[:, :7], k[:, :7], meta()) == "dense"
        out = made(backend, role=role).forward(q, q, q, meta())
        assert torch.equal(out, made(backend).forward(q, q, q, meta()))
        for _ in range(2):  # layers without a grid, as of text
            call = q, q, q, stand_ins.AttentionMetadata()
            assert made(backend, role=role).forward(*call) == "dense"
    pairs = zip(roles, (each.getMessage() for each in caplog.records), strict=True)
    assert all(f"{role!r} are dense with FASTVIDEO_VSA" in said for role, said in pairs)


@pytest.mark.parametrize(
    ("settings", "given", "said"),
    [
        ({}, {"extra": {}}, "vsa_dit_seq_shape is missing in the metadata"),
        ({}, {"attn_mask": 1}, "attn_mask must be None with FASTVIDEO_VSA"),
        ({}, {"full_attn_spans": 1}, "full_attn_spans must be None with FASTVIDEO_VSA"),
        ({"causal": True}, {}, "causal must be False with FASTVIDEO_VSA"),
        ({}, {"extra": {"vsa_dit_seq_shape": (5, 9, 17)}}, "the tokens of vsa_dit_seq_shape"),
        ({}, {"extra": {"vsa_dit_seq_shape": (5, 9)}}, "must be three token counts along"),
        (
            {},
            {"packed_padding": SimpleNamespace(q_length=810, kv_length=800)},
            "packed_padding must have queries and keys of equal length",
        ),
    ],
)
def test_what_cannot_be_served_is_refused(
    backend: Any, settings: dict[str, Any], given: dict[str, Any], said: str
) -> None:
    q, k, v = tensors(math.prod(GRID), 3)
    call = meta()
    vars(call).update(given)
    with pytest.raises(ValueError, match=said):
        made(backend, **settings).forward(q, k, v, call)


def test_settings_that_would_mean_dense_attention_are_refused(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"backend_kwargs may hold .* but it holds \['fallback"):
        made(backend, backend_kwargs={"fallback_on_error": True})
    for topk in (0, 2.5, True, "7"):
        with pytest.raises(ValueError, match=f"fastvideo_vsa_topk must be .* it is {topk!r}"):
            made(backend, backend_kwargs={"topk": topk})
    for block in ("488", (4, 8), (4, 8, 8.5), True, (4, 8, None), {"t": 4}):
        with pytest.raises(ValueError, match="block_size must be three token counts along"):
            made(backend, backend_kwargs={"block_size": block})
    for name in ("ring_degree", "allgather_degree"):
        config = SimpleNamespace(parallel_config=SimpleNamespace(**{name: 2}))
        shared = stand_ins.omni(monkeypatch, config)
        with pytest.raises(ValueError, match=f"{name} must be 1 with FASTVIDEO_VSA"):
            made(shared)  # also of a second model, whose backend is not validated again


H3 = "vllm_omni.diffusion.models.minimax_h3.attention.fastvideo_h3"


@pytest.mark.parametrize("asked", ["validate_available", "get_impl_cls"])
def test_minimax_h3_runs_in_raster_order(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    """Its layer is a class of the model's own, which the host wants to be one of ours.

    As the first model of a process, and after one whose heads have the same size: the host then
    does not ask again whether the backend is available.
    """
    config = SimpleNamespace(model_class_name="MiniMaxH3Pipeline", parallel_config=None)
    backend = stand_ins.omni(monkeypatch, config)
    layer = type("MiniMaxH3VSAImpl", (stand_ins.FastVideoVSAImpl,), {"__init__": lambda self: None})
    assert issubclass(layer, backend.VsaImpl)
    assert not issubclass(stand_ins.SDPAImpl, backend.VsaImpl)
    segments, grid = (70, 20), (5, 9, 10)
    layout = lambda meta: None if meta is None else (segments, grid, meta.start)  # noqa: E731
    stand_ins.put(monkeypatch, H3, MiniMaxH3VSAImpl=layer, _get_h3_layout=layout)
    getattr(backend.VsaBackend, asked)()
    made = layer()
    made.topk, made.softmax_scale, made.causal = 3, HEAD_DIM**-0.5, False
    length = 90 + math.prod(grid)
    q, k, v, gate = tensors(length)
    video = reference.video_tiles(grid, (4, 4, 4))
    tiles, before = reference.packed_tiles(segments, video, 64)
    padded = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 6)) for x in (q, k, v, gate)]
    for given in (None, padded[3]):
        call = meta(given, packed_padding=SimpleNamespace(q_length=length, kv_length=length))
        call.start = 90
        out = made.forward(*padded[:3], call)
        right = reference.attention(q, k, v, tiles, 3, None if given is None else gate, before)
        assert error(out[:, :length], right) < LIMIT and out[:, length:].abs().sum() == 0
    call.attn_mask = 1
    with pytest.raises(ValueError, match="attn_mask must be None with FASTVIDEO_VSA"):
        made.forward(*padded[:3], call)
    call.attn_mask, call.start = None, 100
    with pytest.raises(ValueError, match="vsa_h3_prefix_segments must sum to 100"):
        made.forward(*padded[:3], call)
    monkeypatch.setattr(stand_ins.FastVideoVSAImpl, "forward_cuda", lambda *_: "theirs")
    assert made.forward(q, k, v, None) == "theirs"


@pytest.mark.parametrize(
    ("allowed", "ours"), [(None, False), (["vsa"], False), (["vsa_h3_lists"], True)]
)
def test_its_kernel_of_maps_stays_unless_ours_is_named(
    monkeypatch: pytest.MonkeyPatch, allowed: list[str] | None, ours: bool
) -> None:
    for module, functions in stand_ins.kernels().items():
        stand_ins.put(monkeypatch, module, **functions)
    stand_ins.put(monkeypatch, "vllm", envs=SimpleNamespace(VLLM_PLUGINS=allowed))
    vllm_omni.lists_plugin()
    kernel = sys.modules["fastvideo_kernel.block_sparse_attn"].block_sparse_attn
    assert (kernel is vsa.block_sparse_attn) == ours
