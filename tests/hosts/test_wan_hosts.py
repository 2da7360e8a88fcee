# SPDX-License-Identifier: Apache-2.0
"""FastVideo and SGLang: their layer's calls by ``vsa.attention``, in raster order."""

from __future__ import annotations

import importlib
import math
import pickle
import runpy
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from hosts import reference, stand_ins
from hosts.stand_ins import FASTVIDEO, FASTVIDEO_H3, SGLANG_H3, SGLANG_VSA, Layer, metadata
from hosts.wan_layers import HEAD_DIM, HEADS, error, tensors
from torch import Tensor

import vsa
from vsa.integrations import fastvideo, sglang, vllm_omni
from vsa.integrations.hosts import raster

GRIDS = (5, 7, 9), (4, 8, 8)
LIMIT = 1e-12


@pytest.fixture
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A host's module, not yet changed."""
    name, ranks = getattr(request, "param", ("fastvideo", 1))
    monkeypatch.setattr(stand_ins.HookRegistry, "hooks", [])
    stand_ins.put(
        monkeypatch,
        "sglang.multimodal_gen.runtime.platforms.plugins",
        HookRegistry=stand_ins.HookRegistry,
        HookType=stand_ins.HookType,
    )
    for module, functions in stand_ins.kernels().items():
        stand_ins.put(monkeypatch, module, **functions)
    stand_ins.put(
        monkeypatch,
        FASTVIDEO_H3,
        block_sparse_attn_64_bhsd="theirs",
        block_sparse_attn_256_bshd="theirs",
        **stand_ins.h3_like(),
    )
    stand_ins.put(
        monkeypatch,
        stand_ins.FASTVIDEO_WORKERS,
        WorkerMultiprocProc=stand_ins.WorkerMultiprocProc,
    )
    where = FASTVIDEO if name == "fastvideo" else SGLANG_VSA
    yield stand_ins.put(monkeypatch, where, **stand_ins.wan_like(ranks))
    fastvideo.uninstall()


def switch_on(module: ModuleType) -> str:
    """What a user does, or what the host does by itself."""
    if module.__name__ == FASTVIDEO:
        fastvideo.install()
        return "fastvideo"
    sglang.plugin()
    stand_ins.HookRegistry.apply_hooks()
    return "sglang"


def right(
    inputs: list[Tensor], grid: tuple[int, int, int], topk: int, tile: Any = (4, 4, 4)
) -> Tensor:
    return reference.attention(*inputs[:3], reference.video_tiles(grid, tile), topk, inputs[3])


@pytest.mark.parametrize("host", [("fastvideo", 1), ("sglang", 1)], indirect=True)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("sparsity", [0.0, 0.7, 0.95])
def test_a_layer_gives_what_its_padded_form_gives(
    host: ModuleType, grid: tuple[int, int, int], sparsity: float
) -> None:
    name = "fastvideo" if host.__name__ == FASTVIDEO else "sglang"
    inputs, meta = tensors(math.prod(grid)), metadata(grid, sparsity)
    padded = Layer(name, host, HEADS, HEAD_DIM)(*inputs, meta)
    switch_on(host)
    layer = Layer(name, host, HEADS, HEAD_DIM)
    assert type(layer.attn_impl).__module__ == "vsa.integrations.hosts.implementation"
    out = layer(*inputs, meta)
    topk = raster.tiles_kept(sparsity, vsa.Grid(grid).num_tiles)
    assert error(out, right(inputs, grid, topk)) < LIMIT
    assert error(padded, right(inputs, grid, topk)) < LIMIT


def test_budgets_are_rounded_as_the_hosts_round_them() -> None:
    assert [raster.tiles_kept(0.7, count) for count in (10, 20, 1440)] == [4, 7, 433]
    assert raster.tiles_kept(0.9, 640) == 64 and raster.tiles_kept(1.0, 9) == 1
    for wrong in (None, "0.5", math.nan):
        with pytest.raises(ValueError, match="VSA_sparsity must be a number, but it is"):
            raster.tiles_kept(wrong, 9)
    for wrong in (80, 1.01, torch.tensor(2.0)):
        with pytest.raises(
            ValueError, match=r"VSA_sparsity must be at most 1, the share .* 80 % is"
        ):
            raster.tiles_kept(wrong, 9)
    assert raster.tiles_kept(-0.01, 9) == 9 and raster.tiles_of((5, 7, 9), (4, 4, 4)) == 12


def test_without_a_gate_the_coarse_output_has_weight_one(host: ModuleType) -> None:
    name, grid = switch_on(host), GRIDS[0]
    q, k, v, _ = tensors(math.prod(grid))
    out = Layer(name, host, HEADS, HEAD_DIM)(q, k, v, None, metadata(grid, 0.8))
    assert (
        error(out, right([q, k, v, torch.ones_like(q)], grid, raster.tiles_kept(0.8, 12))) < LIMIT
    )


def test_gradients_go_through_a_layer(host: ModuleType) -> None:
    name, grid = switch_on(host), GRIDS[0]
    inputs = [x.requires_grad_() for x in tensors(math.prod(grid))]
    Layer(name, host, HEADS, HEAD_DIM)(*inputs, metadata(grid, 0.5)).sum().backward()
    found = [x.grad.clone() for x in inputs]
    for x in inputs:
        x.grad = None
    right(inputs, grid, 6).sum().backward()
    assert max(error(x.grad, grad) for x, grad in zip(inputs, found, strict=True)) < 1e-10


def test_larger_tiles_of_the_host_are_taken(host: ModuleType) -> None:
    name, grid = switch_on(host), (5, 9, 18)
    host.VSA_TILE_SIZE = (4, 8, 8)
    inputs = tensors(math.prod(grid))
    out = Layer(name, host, HEADS, HEAD_DIM)(*inputs, metadata(grid, 0.8))
    topk = raster.tiles_kept(0.8, 12)
    assert error(out, right(inputs, grid, topk, (4, 8, 8))) < LIMIT


@pytest.mark.parametrize("host", [("sglang", 4)], indirect=True)
def test_padding_of_a_sequence_that_ranks_share_takes_no_part(host: ModuleType) -> None:
    name, grid = switch_on(host), GRIDS[0]
    inputs = tensors(math.prod(grid))
    padded = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 3), value=math.nan) for x in inputs]
    layer = Layer(name, host, HEADS, HEAD_DIM)
    out = layer(*padded, metadata(grid, 0.8))
    assert error(out[:, :-3], right(inputs, grid, raster.tiles_kept(0.8, 12))) < LIMIT
    assert out[:, -3:].abs().max() == 0
    padded = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 4)) for x in inputs]
    with pytest.raises(ValueError, match=r"query must be .* S = 315, the tokens of dit_seq_shape"):
        layer(*padded, metadata(grid, 0.8))


def test_what_a_layer_cannot_do_is_refused(host: ModuleType) -> None:
    name, grid = switch_on(host), GRIDS[0]
    with pytest.raises(ValueError, match=r"causal must be False: FastVideo"):
        Layer(name, host, HEADS, HEAD_DIM, causal=True)
    with pytest.raises(ValueError, match=r"softmax_scale must be head_size \*\* -0.5 = 0.25"):
        Layer(name, host, HEADS, HEAD_DIM, softmax_scale=1.0)
    layer, inputs = Layer(name, host, HEADS, HEAD_DIM), tensors(math.prod(grid))
    with pytest.raises(ValueError, match=r"attn_metadata is None: FastVideo builds it only where"):
        layer(*inputs, None)
    with pytest.raises(ValueError, match="attn_metadata is None"):  # as other backends are called
        layer.attn_impl.forward(*inputs[:3], metadata(grid, 0.5))
    with pytest.raises(ValueError, match=r"query must be .* but its shape is \(2, 314, 2, 16\)"):
        layer(*(x[:, :-1] for x in inputs), metadata(grid, 0.5))
    host.VSA_TILE_SIZE = (1, 9, 9)
    with pytest.raises(ValueError, match="the host's tile must be at most 64 tokens"):
        layer(*inputs, metadata(grid, 0.5))


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]


@pytest.mark.parametrize("host", [("sglang", 1)], indirect=True)
def test_sglang_keeps_a_kernel_of_its_own_on_other_gpus(
    host: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its class takes the kernel from ``vsa``; where that is us, there is none to keep."""
    switch_on(host)
    backend, ours = host.VideoSparseAttentionBackend, "RasterVideoSparseAttention"
    for kernel in (None, vsa.video_sparse_attn, "its own"):
        host.video_sparse_attn = kernel
        stand_ins.gpu(monkeypatch, None)
        assert backend.get_impl_cls().__name__ == ours and not warnings_of(caplog)
        stand_ins.gpu(monkeypatch, "it is another GPU")
        names = {backend.get_impl_cls().__name__ for _ in range(2)}
        assert names == {"VideoSparseAttentionImpl" if kernel == "its own" else ours}
        (said,) = warnings_of(caplog)
        assert "backend 'hopper' cannot run on this device (it is another GPU)" in said
        assert ("stays on SGLang's own kernel" in said) == (kernel == "its own")
        assert (f"{sglang.GIVE_BACK} brings it back" in said) != (kernel == "its own")
        caplog.clear()


def test_what_is_installed_by_a_call_runs_on_any_gpu(
    host: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stand_ins.gpu(monkeypatch, "it is another GPU")
    switch_on(host)
    name = host.VideoSparseAttentionBackend.get_impl_cls().__name__
    assert name == "RasterVideoSparseAttention" and not warnings_of(caplog)


def test_plugins_ask_no_gpu_where_they_are_loaded(
    host: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would initialise CUDA in a process that may fork."""

    def asked(**_: Any) -> None:
        raise AssertionError("the GPU was asked")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", asked)
    sglang.plugin()
    sglang.h3_plugin()
    stand_ins.omni(monkeypatch)
    vllm_omni.plugin()


def test_a_budget_is_part_of_a_graph_whose_sizes_are_symbols() -> None:
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="eager")
    def kept(x: Tensor, grid: list[int]) -> Tensor:
        tiles = raster.tiles_of(raster.extent("dit_seq_shape", grid), (4, 4, 4))
        return x * raster.tiles_kept(0.7, tiles)

    assert [kept(torch.ones(1), [*grid]).item() for grid in GRIDS] == [4, 2]


def test_install_is_done_once_and_undone_whole(host: ModuleType) -> None:
    before = vars(host.VideoSparseAttentionBackend)["get_impl_cls"]
    kernel = importlib.import_module("fastvideo_kernel.block_sparse_attn")
    theirs = kernel.block_sparse_attn
    fastvideo.install()
    fastvideo.install()
    assert kernel.block_sparse_attn is theirs
    fastvideo.install(lists=True)
    assert kernel.block_sparse_attn is vsa.block_sparse_attn
    assert importlib.import_module(FASTVIDEO_H3).block_sparse_attn_64_bhsd is vsa.block_sparse_attn
    assert sys.modules["fastvideo_kernel"].block_sparse_attn is vsa.block_sparse_attn
    fastvideo.uninstall()
    assert vars(host.VideoSparseAttentionBackend)["get_impl_cls"] is before
    assert kernel.block_sparse_attn is theirs
    assert importlib.import_module(FASTVIDEO_H3).block_sparse_attn_64_bhsd == "theirs"
    assert not hasattr(sys.modules["fastvideo_kernel"], "block_sparse_attn_from_indices")


def test_a_worker_is_installed_before_it_begins(host: ModuleType) -> None:
    """A new process knows of the parent's install() by the function that it is given alone."""
    before = vars(stand_ins.WorkerMultiprocProc)["worker_main"]
    for lists in (False, True):
        fastvideo.install(lists=lists)
        started = pickle.loads(pickle.dumps(stand_ins.WorkerMultiprocProc.worker_main))
        fastvideo.uninstall()  # as in a new process
        said = started(1, rank=0)
        assert said == ("RasterVideoSparseAttention", (1,), {"rank": 0})
        kernel = sys.modules["fastvideo_kernel.block_sparse_attn"].block_sparse_attn
        assert (kernel is vsa.block_sparse_attn) == lists
        assert started(2) == ("RasterVideoSparseAttention", (2,), {})  # installed already
        fastvideo.uninstall()
        assert vars(stand_ins.WorkerMultiprocProc)["worker_main"] is before


def test_what_fails_half_way_changes_nothing(host: ModuleType) -> None:
    before = vars(host.VideoSparseAttentionBackend)["get_impl_cls"]
    del sys.modules[FASTVIDEO_H3].block_sparse_attn_64_bhsd
    with pytest.raises(ImportError, match=r"has no block_sparse_attn_64_bhsd: this FastVideo is"):
        fastvideo.install(lists=True)
    assert vars(host.VideoSparseAttentionBackend)["get_impl_cls"] is before


def test_undoing_what_another_has_replaced_is_refused(
    host: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    fastvideo.install()
    with monkeypatch.context() as other:
        other.setattr(host.VideoSparseAttentionBackend, "get_impl_cls", staticmethod(int))
        with pytest.raises(RuntimeError, match=r"get_impl_cls of .* was replaced again after"):
            fastvideo.uninstall()


def test_without_its_kernels_fastvideo_finds_ours(
    host: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in stand_ins.kernels():
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    fastvideo.install()
    from fastvideo_kernel import video_sparse_attn
    from fastvideo_kernel.block_sparse_attn_256 import block_sparse_attn_256_bshd

    assert video_sparse_attn is vsa.video_sparse_attn and callable(block_sparse_attn_256_bshd)
    assert importlib.util.find_spec("fastvideo_kernel.ops") is not None
    with pytest.raises(ImportError):
        from fastvideo_kernel import moba_attn_varlen  # noqa: F401
    fastvideo.uninstall()
    assert "fastvideo_kernel" not in sys.modules


def test_a_module_of_the_host_runs_after_install(
    host: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: Any
) -> None:
    (tmp_path / "their_cli.py").write_text(
        "import sys\n"
        f"from {FASTVIDEO} import VideoSparseAttentionBackend as Backend\n"
        "print(__name__, sys.argv[1:], Backend.get_impl_cls().__name__)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["run", "their_cli", "generate", "--help"])
    runpy.run_module("vsa.integrations.fastvideo.run", run_name="__main__")
    said = capsys.readouterr().out
    assert said == "__main__ ['generate', '--help'] RasterVideoSparseAttention\n"
    monkeypatch.setattr(sys, "argv", ["run"])
    with pytest.raises(SystemExit, match="MODULE is missing"):
        runpy.run_module("vsa.integrations.fastvideo.run", run_name="__main__")


def test_without_the_host_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImportError, match=r"fastvideo is not installed: run pip install"):
        fastvideo.install()
    with pytest.raises(TypeError, match=r"lists must be True or False, but it is 1"):
        fastvideo.install(lists=1)


@pytest.mark.parametrize("host", [("sglang", 1)], indirect=True)
@pytest.mark.parametrize(
    ("allowed", "ours"), [("", False), ("vsa", False), ("vsa, vsa_h3_lists", True)]
)
def test_sglang_keeps_its_kernel_of_lists_unless_ours_is_named(
    host: ModuleType, monkeypatch: pytest.MonkeyPatch, allowed: str, ours: bool
) -> None:
    class Setting:
        get = staticmethod(lambda: allowed)

    stand_ins.put(
        monkeypatch, "sglang.srt.environ", envs=type("E", (), {"SGLANG_PLUGINS": Setting})
    )
    kernels = stand_ins.put(monkeypatch, SGLANG_H3, vsa_h3_block_sparse_attn_forward="theirs")
    sglang.lists_plugin()
    stand_ins.HookRegistry.apply_hooks()
    assert (kernels.vsa_h3_block_sparse_attn_forward == "theirs") != ours
