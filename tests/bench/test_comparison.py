# SPDX-License-Identifier: Apache-2.0
"""bench/comparison: orders of tokens, parity before times, and how each kernel is called."""

from __future__ import annotations

import pytest
import torch

from comparison import timing, worker
from comparison.cute import CudnnBsa
from comparison.dense import FlashAttention3
from comparison.kernel import Kernel
from comparison.lists import ascending_lists
from comparison.problem import Case, Problem
from comparison.sparse import ThunderKittensVsa
from comparison.timing import rested, rotated
from vsa.measure.gpu_monitor import Monitor, reading_of
from vsa.verify.sampled import Sample

pytest.importorskip("vsa._C", reason="vsa was built without its compiled part")

CPU = torch.device("cpu")
RAGGED = Case((5, 6, 9), 2, 64, "random", 0.25)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem(RAGGED, CPU)


def quiet() -> Monitor:
    return Monitor(CPU)


# ---- inputs -------------------------------------------------------------------------------------


def test_tiles_hold_their_real_tokens_first(problem: Problem) -> None:
    x = problem.sets[0].q
    tiles = problem.arranged("tiles")[0].q.unflatten(2, (-1, 64))
    tile_of_token = problem.grid.tile_of_token()
    for tile, size in enumerate(problem.tile_sizes.tolist()):
        assert torch.equal(tiles[0, :, tile, :size].transpose(0, 1), x[0, tile_of_token == tile])
        assert not tiles[0, :, tile, size:].any()


def test_results_come_back_into_raster_order(problem: Problem) -> None:
    (raster, tiles), lse = (problem.arranged(x)[1].k for x in ("raster", "tiles")), None
    assert torch.equal(problem.restored(tiles, "tiles"), raster)
    lse = problem.restored(tiles[..., 0], "tiles")
    assert torch.equal(lse, raster[..., 0].transpose(1, 2))
    assert problem.restored(raster, "raster") is raster


def test_inputs_are_the_same_each_time_and_differ_between_sets(problem: Problem) -> None:
    again = Problem(RAGGED, CPU)
    assert again.fingerprint() == problem.fingerprint()
    assert not torch.equal(problem.sets[0].q, problem.sets[1].q)
    again.sets[1].upstream[0, 3, 1, 5] += 1
    assert again.fingerprint() != problem.fingerprint()


def test_flops_count_pairs_of_real_tokens(problem: Problem) -> None:
    attended = problem.selection.mask()[:, :, problem.grid.tile_of_token()]
    pairs = attended[..., problem.grid.tile_of_token()].sum().item()
    assert problem.flops("forward", dense=False) == 4 * 64 * pairs
    assert problem.flops("backward", dense=True) == 10 * 64 * 2 * problem.grid.tokens**2


def test_lists_are_ascending_with_zeros_behind() -> None:
    mask = torch.tensor([[[[0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]]]).bool()
    columns, count = ascending_lists(mask)
    assert columns.tolist() == [[[[1, 3], [0, 0], [0, 0]]]] and count.tolist() == [[[2, 1, 0]]]
    assert columns.dtype == count.dtype == torch.int32


# ---- kernels of others, their wheels replaced by PyTorch ----------------------------------------


def attention(q, k, v, mask):
    """(B, heads, S, d) in fp32 with a mask of tokens: out and lse."""
    scores = (q.float() @ k.float().mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v.float()).to(q.dtype), scores.logsumexp(-1)


def gradients(q, k, v, mask, upstream):
    leaves = [x.detach().float().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(attention(*leaves, mask)[0], leaves, upstream.float())


def token_mask(columns, count, sizes, keys=True):
    """The mask that lists and sizes of 64-token tiles mean, (B, heads, slots, slots)."""
    tiles = len(sizes)
    listed = torch.arange(columns.shape[-1]) < count[..., None]
    kept = torch.zeros(*columns.shape[:3], tiles, dtype=torch.int)
    kept = kept.scatter_add(-1, columns.long(), listed.int()) > 0
    kept = kept if keys else kept.mT
    real = (torch.arange(64) < sizes[:, None]).flatten()
    return kept.repeat_interleave(64, 2).repeat_interleave(64, 3) & real


def loaded(kind: type[Kernel], **attributes) -> Kernel:
    """A kernel whose library is replaced."""
    kernel = kind.__new__(kind)
    kernel.device = CPU
    vars(kernel).update(attributes)
    return kernel


class FakeThunderKittens:
    @staticmethod
    def block_sparse_fwd(q, k, v, columns, count, sizes):
        out, lse = attention(q, k, v, token_mask(columns, count, sizes))
        return out, lse[..., None] * -(q.shape[-1] ** 0.5)

    @staticmethod
    def block_sparse_bwd(q, k, v, out, aux, upstream, columns, count, sizes):
        return gradients(q, k, v, token_mask(columns, count, sizes, keys=False), upstream)


class FakeBsa:
    @staticmethod
    def mask(lists, block_sizes, q2k_block_nums, sparse_block_size, layout, **_):
        assert (sparse_block_size, layout) == (64, "bhsd")
        return token_mask(lists, q2k_block_nums, block_sizes)

    @classmethod
    def block_sparse_attention_forward(cls, q, k, v, lists, kv_splits, **options):
        out, lse = attention(q, k, v, cls.mask(lists, **options))
        return {"o_tensor": out, "lse_tensor": lse}

    @classmethod
    def block_sparse_attention_backward(cls, upstream, q, k, v, out, lse, lists, **options):
        grads = gradients(q, k, v, cls.mask(lists, **options), upstream)
        return dict(zip(("dq_tensor", "dk_tensor", "dv_tensor"), grads, strict=True))


class FakeFlashAttention3:
    @staticmethod
    def fwd(q, k, v, num_splits, softmax_scale, is_causal):
        assert not is_causal and softmax_scale == q.shape[-1] ** -0.5
        out, lse = attention(*(x.transpose(1, 2) for x in (q, k, v)), torch.tensor(True))
        return out.transpose(1, 2), lse, None, None

    @staticmethod
    def bwd(upstream, q, k, v, out, lse, dq, dk, dv, **options):
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        found = gradients(*heads_first, torch.tensor(True), upstream.transpose(1, 2))
        for grad, to in zip(found, (dq, dk, dv), strict=True):
            to.copy_(grad.transpose(1, 2))


KINDS = {
    "tk_vsa": lambda: loaded(ThunderKittensVsa, module=FakeThunderKittens),
    "cudnn_bsa": lambda: loaded(CudnnBsa, module=FakeBsa),
    "fa3": lambda: loaded(FlashAttention3, operators=FakeFlashAttention3),
    "vsa": lambda: worker.KERNELS["vsa"](CPU, []),
    "whole": lambda: worker.KERNELS["whole"](CPU, []),
    "flex": lambda: worker.KERNELS["flex"](CPU, []),
}


@pytest.mark.parametrize("name", KINDS)
def test_each_kernel_passes_parity_and_is_timed(name: str) -> None:
    case = Case((5, 6, 9), 2, 128, "correlated", 0.25)
    kernel, problem = KINDS[name](), Problem(case, CPU)
    kernel.plan(problem)
    forward, backward = worker.measure(kernel, problem, ("forward", "backward"), 0.001, quiet())
    assert forward["errors"]["out"] < 0.01 and forward["ms"] > 0
    assert name == "whole" or forward["errors"]["lse"] < 1e-3
    if name == "flex":
        assert "needs a CUDA GPU" in backward["skipped"]
        return
    assert set(backward["errors"]) == {"dq", "dk", "dv"} and backward["tflops"] > 0
    assert (forward["pattern"] is None) == kernel.dense


def test_a_backward_that_a_kernel_lacks_is_skipped_with_a_reason() -> None:
    kernel, problem = KINDS["cudnn_bsa"](), Problem(RAGGED, CPU)
    kernel.plan(problem)
    forward, backward = worker.measure(kernel, problem, ("forward", "backward"), 0.001, quiet())
    assert "ms" in forward
    assert backward["skipped"] == "its backward needs head_dim 128, but it is 64"


def test_wrong_results_are_not_timed(problem: Problem) -> None:
    class Shifted(FakeThunderKittens):
        @staticmethod
        def block_sparse_fwd(q, k, v, columns, count, sizes):
            return FakeThunderKittens.block_sparse_fwd(q, k, v, columns.flip(2), count, sizes)

    kernel = loaded(ThunderKittensVsa, module=Shifted)
    kernel.plan(problem)
    (row,) = worker.measure(kernel, problem, ("forward",), 0.001, quiet())
    assert row["failed"].startswith("wrong results, so not timed: out by") and "ms" not in row


def test_nan_is_wrong(problem: Problem) -> None:
    sample = Sample(problem.grid, problem.selection.mask()[0], *problem.sets[0])
    assert sample.verdict({"out": 1e-3, "lse": 0.0}) is None
    assert "dq" in str(sample.verdict({"dq": float("nan"), "dk": 0.0}))


def test_fp32_is_held_to_a_hundredth_of_it(problem: Problem) -> None:
    wide = [x.float() for x in problem.sets[0]]
    sample = Sample(problem.grid, problem.selection.mask()[0], *wide)
    assert sample.verdict({"out": 1e-3}) == (
        "wrong results, so not timed: out by 0.001 (at most 0.0001)"
    )


# ---- times --------------------------------------------------------------------------------------


def test_calls_go_round_the_items() -> None:
    seen = []
    times = rotated(seen.append, "abc", CPU, 0.0)
    assert len(times) == 7 and "".join(seen[:9]) == "abcabcabc"


def test_a_rest_comes_before_every_pair_of_calls(monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(timing.time, "sleep", lambda pause: seen.append(f"{pause:g} "))
    times = rested(seen.append, "abc", CPU)
    assert len(times) == timing.RESTS and all(time >= 0 for time in times)
    assert "".join(seen).startswith("0.05 ab0.05 ca0.05 bc0.05 ab")


def test_what_nvidia_smi_says_belongs_to_the_time_it_was_said() -> None:
    monitor = quiet()
    lines = "900, 100, 30, 0x1", "1700, 600.5, 50, 0x4", "1600, 700, 60, 0x24", "1, 1, 1, 0x4"
    monitor.readings = [(float(i), reading_of(line)) for i, line in enumerate(lines)]
    found = monitor.during(0.5, 2.5)
    assert found["clock"] == 1650 and found["power"] == 650.25 and found["samples"] == 2
    assert found["power_capped"] == 0.5 and found["lowest_clock"] == 1600
    assert monitor.during(5, 6) == {}
    monitor.close()


@pytest.mark.parametrize("line", ["No devices were found", "1700, [N/A], 50, 0x4", "1700, 600, 50"])
def test_what_says_no_numbers_is_no_reading(line: str) -> None:
    assert reading_of(line) is None
