# SPDX-License-Identifier: Apache-2.0
"""How FlashAttention-4, cuDNN's flex, cake, VSA-H3 and SpargeAttention are called.

Their libraries are replaced by PyTorch, which reads the arguments as their documentation has it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

import vsa
from comparison import cake, report, serving, worker
from comparison.archives import Unavailable
from comparison.cute import CudnnFlex, FlashAttention4
from comparison.kernel import Kernel
from comparison.problem import Case, Problem
from vsa.measure.gpu_monitor import Monitor

pytest.importorskip("vsa._C", reason="vsa was built without its compiled part")

CPU = torch.device("cpu")
WHOLE = Case((4, 8, 16), 2, 128, "random", 0.5)
RAGGED = Case((5, 6, 9), 2, 128, "random", 0.25)


def attention(q, k, v, mask):
    """(B, heads, S, d) in fp32 with a mask of tokens: out and lse."""
    scores = (q.float() @ k.float().mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v.float()).to(q.dtype), scores.logsumexp(-1)


def token_mask(tiles: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    real = torch.cat([torch.arange(64) < size for size in sizes])
    return tiles.repeat_interleave(64, -2).repeat_interleave(64, -1) & real


def listed(columns: torch.Tensor, count: torch.Tensor, tiles: int) -> torch.Tensor:
    mask = torch.zeros(*count.shape, tiles, dtype=torch.bool)
    for at in torch.cartesian_prod(*map(torch.arange, count.shape)).tolist():
        mask[tuple(at)][columns[tuple(at)][: count[tuple(at)]].long()] = True
    return mask


class FakeLists(NamedTuple):
    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor
    full_block_idx: torch.Tensor
    block_size: tuple[int, int]


def fake_flash_attention_4(q, k, v, softmax_scale, block_sparse_tensors, return_lse):
    lists = block_sparse_tensors
    assert lists.block_size == (64, 64) and return_lse and softmax_scale == q.shape[-1] ** -0.5
    assert not lists.mask_block_cnt.any() and lists.mask_block_idx.shape[-1] == 1
    tiles = q.shape[1] // 64
    mask = token_mask(listed(lists.full_block_idx, lists.full_block_cnt, tiles), [64] * tiles)
    out, lse = attention(*(x.transpose(1, 2) for x in (q, k, v)), mask)
    return out.transpose(1, 2), lse


class FakeFlex:
    plans = 0

    @classmethod
    def create_mask_plan(cls, mask_func, q, k, v, build_backward):
        assert q.shape == k.shape == v.shape and mask_func.shape[-1] == q.shape[1]
        assert mask_func.shape[0] == q.shape[2] and build_backward
        cls.plans += 1
        key = torch.arange(q.shape[1])
        mask = key < mask_func[:, 0, :, None]
        for begin, end in zip(mask_func.unbind(1)[1::2], mask_func.unbind(1)[2::2], strict=True):
            mask = mask | ((key >= begin[..., None]) & (key < end[..., None]))
        return mask

    @staticmethod
    def flex_attn_func(q, k, v, mask_plan, softmax_scale, return_lse):
        out, lse = attention(*(x.transpose(1, 2) for x in (q, k, v)), mask_plan)
        return out.transpose(1, 2), lse


class FakeCake:
    """In fp8 a plan holds scales, of each query, of 16 keys and of each channel of V."""

    K_SCALE_GROUP = 16

    @staticmethod
    def cluster_capacity(index):
        return {2: 66, 4: 30}

    @staticmethod
    def create_plan(device, mask, rows, columns, q_heads, kv_heads, head_dim, sm_scale, **fp8):
        assert q_heads == kv_heads == mask.shape[0] and head_dim == 128 and sm_scale == 128**-0.5
        assert mask.dtype == torch.bool
        assert rows.shape == mask.shape[:2] and columns.shape == (mask.shape[0], mask.shape[2])
        tokens = token_mask(mask, [64] * mask.shape[-1])

        def run(q, k, v):
            if fp8:
                assert fp8["q_data_type"] == q.dtype == k.dtype == v.dtype
                q = q.float() * fp8["q_scale"][0, ..., None]
                k = k.float() * fp8["k_scale"][0].repeat_interleave(16, -1)[..., None]
                v = v.float() * fp8["v_scale"][:, None]
            return attention(q, k, v, tokens)[0].bfloat16()

        return SimpleNamespace(run=run)

    @staticmethod
    def sage_fp8_quantize_sm90(q, k, v):
        def scaled(x, largest):
            return largest.float() / 448, (x.float() / (largest / 448)).to(torch.float8_e4m3fn)

        groups = k.abs().unflatten(1, (-1, 16)).amax((-2, -1))
        q_scale, q8 = scaled(q, q.abs().amax(-1, keepdim=True))
        _, k8 = scaled(k, groups.repeat_interleave(16, -1)[..., None])
        v_scale, v8 = scaled(v, v.abs().amax(1, keepdim=True))
        return q8, k8, v8, q_scale[None, ..., 0], groups[None].float() / 448, v_scale[:, 0]


class FakeH3:
    @staticmethod
    def vsa_h3_block_sparse_attn_forward(q, k, v, columns, count, sizes):
        mask = token_mask(listed(columns, count, len(sizes)), sizes.tolist())
        return attention(q, k, v, mask)[0]


class FakeQuantising:
    """Blocks in int8 by their largest value, and lists of steps from block to block."""

    @staticmethod
    def get_vanilla_qk_quant(q, k, mean, q_block, k_block):
        def quantised(x, block):
            parts = x.float().unflatten(2, (-1, block))
            scale = parts.abs().amax((-2, -1)) / 127
            return (parts / scale[..., None, None]).round().to(torch.int8).flatten(2, 3), scale

        return *quantised(q, q_block), *quantised(k.float() - mean.float(), k_block)

    @staticmethod
    def block_map_lut_triton(mask):
        assert mask.is_contiguous()
        steps = torch.zeros(mask.shape, dtype=torch.int32)
        for at in torch.cartesian_prod(*map(torch.arange, mask.shape[:3])).tolist():
            places = mask[tuple(at)].nonzero().flatten().int()
            steps[tuple(at)][: len(places)] = places.diff(prepend=places.new_zeros(1))
        return steps, mask.sum(-1, dtype=torch.int32)


class FakeSparge:
    @staticmethod
    def transpose_pad_permute(v, turned, layout):
        assert layout == 1 and turned.is_contiguous()
        turned.copy_(v.mT)

    @staticmethod
    def scale_fuse_quant(turned, v, scale, tokens, largest, layout):
        assert (tokens, largest, layout) == (turned.shape[-1], 2.25, 1)
        scale.copy_(turned.float().abs().amax(-1) / largest)
        v.copy_((turned.float() / scale[..., None]).to(v.dtype))

    @staticmethod
    def attention(q, k, v, out, steps, count, q_scale, k_scale, v_scale, *options):
        assert options == (1, 0, 1, out.shape[-1] ** -0.5)
        blocks = listed(steps.cumsum(-1), count, k_scale.shape[-1])
        mask = blocks.repeat_interleave(64, -2).repeat_interleave(128, -1)
        wide = q.float() * q_scale.repeat_interleave(64, -1)[..., None]
        keys = k.float() * k_scale.repeat_interleave(128, -1)[..., None]
        values = (v.float() * v_scale[..., None]).mT
        out.copy_(attention(wide, keys, values, mask)[0])


def loaded(kind: type[Kernel], **attributes) -> Kernel:
    kernel = kind.__new__(kind)
    kernel.device = CPU
    vars(kernel).update(attributes)
    return kernel


KINDS = {
    "fa4": lambda: loaded(FlashAttention4, attend=fake_flash_attention_4, lists_of=FakeLists),
    "cudnn_flex": lambda: loaded(CudnnFlex, module=FakeFlex),
    "cake": lambda: loaded(cake.Cake, module=FakeCake),
    "cake_fp8": lambda: loaded(cake.CakeInFp8, module=FakeCake),
    "sglang_h3": lambda: loaded(serving.SglangH3, module=FakeH3),
    "sparge": lambda: loaded(
        serving.SpargeAttention, quantising=FakeQuantising, compiled=FakeSparge
    ),
}


def measured(kernel: Kernel, case: Case) -> list[dict]:
    problem = Problem(case, CPU)
    kernel.plan(problem)
    return list(worker.measure(kernel, problem, ("forward", "backward"), 0.001, Monitor(CPU)))


@pytest.mark.parametrize("name", KINDS)
def test_each_passes_parity_and_is_timed(name: str) -> None:
    forward, backward = measured(KINDS[name](), WHOLE)
    limit = 0.05 if KINDS[name]().precision == "fp8" else 0.005
    assert forward["errors"]["out"] < limit and forward["ms"] > 0, forward
    assert ("plan_ms" in forward) == (name in ("cake", "cake_fp8", "cudnn_flex"))
    assert ("planned in" in report.line({"kernel": name} | forward)) == ("plan_ms" in forward)
    if name == "cudnn_flex":
        assert set(backward["errors"]) == {"dq", "dk", "dv"} and backward["tflops"] > 0
    else:
        assert "forward alone" in backward["skipped"] or "of 128 tokens" in backward["skipped"]


@pytest.mark.parametrize("name", ["cudnn_flex", "sglang_h3"])
def test_clipped_tiles_pass_too(name: str) -> None:
    forward = measured(KINDS[name](), RAGGED)[0]
    assert forward["errors"]["out"] < 0.005 and forward["pattern"] == "random"


@pytest.mark.parametrize("name", ["fa4", "cake", "cake_fp8"])
def test_clipped_tiles_are_skipped_with_a_reason(name: str) -> None:
    with pytest.raises(Unavailable, match="needs whole tiles"):
        KINDS[name]().plan(Problem(RAGGED, CPU))


def test_cake_takes_64_tiles_in_a_row_and_no_more(monkeypatch) -> None:
    monkeypatch.setattr(cake, "MOST_KEY_TILES", 3)
    with pytest.raises(Unavailable, match="at most 3 key tiles in a row, but one has 4"):
        KINDS["cake"]().plan(Problem(WHOLE, CPU))


def test_a_list_that_is_off_by_one_tile_is_not_timed() -> None:
    class Shifted(FakeH3):
        @staticmethod
        def vsa_h3_block_sparse_attn_forward(q, k, v, columns, count, sizes):
            moved = (columns + 1) % len(sizes)
            return FakeH3.vsa_h3_block_sparse_attn_forward(q, k, v, moved, count, sizes)

    forward = measured(loaded(serving.SglangH3, module=Shifted), WHOLE)[0]
    assert forward["failed"].startswith("wrong results, so not timed: out by")


# ---- patterns of pairs --------------------------------------------------------------------------


def test_pairs_are_the_same_for_theirs_and_ours_and_have_a_name_of_their_own() -> None:
    theirs = measured(KINDS["sparge"](), WHOLE)[0]
    for name in ("vsa_pairs", "vsa_int8_pairs", "vsa_fp8_pairs"):
        ours = measured(worker.KERNELS[name](CPU, []), WHOLE)[0]
        assert ours["pattern"] == theirs["pattern"] == "random, in pairs"
        assert ours["inputs"] == theirs["inputs"] and ours["topk"] == theirs["topk"] == 4
        assert ours["errors"]["out"] < 0.065, ours


def test_an_odd_number_of_tiles_has_no_pairs() -> None:
    with pytest.raises(Unavailable, match="3 tiles are no whole number of pairs"):
        KINDS["sparge"]().plan(Problem(Case((4, 4, 12), 1, 128, "random", 0.5), CPU))


def test_a_clipped_pair_is_no_block_of_128_keys() -> None:
    with pytest.raises(Unavailable, match="needs whole tiles"):
        KINDS["sparge"]().plan(Problem(Case((4, 4, 7), 1, 128, "random", 0.5), CPU))


# ---- loading ------------------------------------------------------------------------------------


def compiled_flashinfer(folder: Path) -> list[Path]:
    """What bench/compile_peers.py makes of it, and nothing else."""
    package = folder / "flashinfer_sm90" / "flashinfer" / "cake_vsa_sm90_backend"
    package.mkdir(parents=True)
    (folder / "flashinfer_sm90" / "tvm_ffi.py").write_text("")
    (package.parent / "__init__.py").write_text("raise ImportError('it wants NCCL')")
    (package / "__init__.py").write_text("import tvm_ffi\ncreate_plan = 'planner'")
    return [folder]


@pytest.fixture
def importing(monkeypatch):
    """Imports that are undone, and no driver."""
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("cake_vsa_sm90_backend", "tvm_ffi"):
            del sys.modules[name]


def test_cake_is_imported_without_the_package_around_it(importing, tmp_path: Path) -> None:
    kernel = loaded(cake.Cake)
    kernel.load(compiled_flashinfer(tmp_path))
    assert kernel.module.create_plan == "planner"


def test_pairs_need_no_more_than_the_selection() -> None:
    problem = Problem(WHOLE, CPU)
    kernel = worker.KERNELS["vsa_pairs"](CPU, [])
    kernel.plan(problem)
    mask = problem.selection.mask()
    assert isinstance(problem.selection, vsa.Selection)
    assert torch.equal(mask[..., ::2], mask[..., 1::2])
