# SPDX-License-Identifier: Apache-2.0
"""The drop-ins in PyTorch's machinery: operators, compiled code, autocast, transforms, graphs."""

from __future__ import annotations

import pytest
import torch
from drop_ins.padded import Call, numbers, padding
from drop_ins.test_padded import attend
from torch import Tensor
from torch.func import jvp
from torch.utils.flop_counter import FlopCounterMode

import vsa
from vsa.backends import BACKENDS, Request
from vsa.values import bitmap

Machine = tuple[str, str]
CALL = Call((64, 9, 64), kv_sizes=(30, 64, 0, 64), heads=4, kv_heads=2, batch=2, head_dim=64)
BF16 = CALL._replace(dtype=torch.bfloat16)


def operands(call: Call, backend: str) -> tuple:
    """Arguments of ``torch.ops.vsa.padded_attention`` up to the backend."""
    tensors = call.tensors()
    q, k, v = (tensors[name].transpose(1, 2).requires_grad_() for name in "qkv")
    words = bitmap.pack(call.lists() & (numbers(call.of_keys) > 0))
    scale = call.head_dim**-0.5
    return q, k, v, words, numbers(call.sizes), numbers(call.of_keys), scale, backend


@pytest.mark.parametrize("backend", ["torch", "emulated"])
def test_opcheck(backend: str) -> None:
    call = Call((64, 9), kv_sizes=(30, 0), head_dim=64, dtype=torch.bfloat16)
    arguments = operands(call, backend)
    # NaN in padding is none in results, but it is one in the numbers that opcheck compares.
    arguments = (
        *(x.detach().nan_to_num(0).requires_grad_() for x in arguments[:3]),
        *arguments[3:],
    )
    torch.library.opcheck(torch.ops.vsa.padded_attention, (*arguments, 2))
    given = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    out, lse = torch.ops.vsa.padded_attention(*given, 2)
    for grad_lse in (None, torch.randn_like(lse)):
        backward = (torch.randn_like(out), grad_lse, out, lse, *given, 2)
        torch.library.opcheck(torch.ops.vsa.padded_attention_backward, backward)
    sizes = [given[4], given[5], given[5]]
    torch.library.opcheck(torch.ops.vsa.padded_tile_means, (list(arguments[:3]), sizes, backend))
    if backend == "torch":
        return
    means = torch.ops.vsa.padded_tile_means(given[:3], sizes, backend)
    gate = torch.randn_like(given[0]).requires_grad_()
    coarse = torch.randn_like(means[0])
    gated = (*arguments, *means, None, gate, coarse)
    torch.library.opcheck(torch.ops.vsa.padded_gated_attention, gated)
    inference = (*given, None, gate.detach(), coarse)
    torch.library.opcheck(torch.ops.vsa.padded_gated_attention_inference, inference)
    with torch.no_grad():
        out, lse, fine = torch.ops.vsa.padded_gated_attention(*gated)
    backward = (torch.randn_like(out), None, fine, lse, *given, *means, None, gate.detach(), coarse)
    torch.library.opcheck(torch.ops.vsa.padded_gated_attention_backward, backward)


@pytest.mark.older_pytorch
@pytest.mark.parametrize("weight", ["full", "per head", None], ids=str)
def test_one_graph_with_the_bits_of_eager_calls(
    weight: str | None, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, device = machine
    call = BF16._replace(weight=weight)
    expected = attend(call, call.tensors(), device, backend=backend)
    compiled = torch.compile(vsa.video_sparse_attn, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(vsa, "video_sparse_attn", compiled)
    found = attend(call, call.tensors(), device, backend=backend)
    assert all(torch.equal(x, expected[name]) for name, x in found.items())


def test_the_same_bits_every_time(machine: Machine) -> None:
    backend, device = machine
    first = attend(BF16, BF16.tensors(), device, backend=backend)
    again = attend(BF16, BF16.tensors(), device, backend=backend)
    assert all(torch.equal(x, again[name]) for name, x in first.items())


@pytest.mark.parametrize("backend", ["torch", "emulated"])
def test_inference_has_the_bits_of_training(backend: str) -> None:
    tensors = BF16.tensors()
    q, k, v = (tensors[name] for name in "qkv")
    trained = attend(BF16, tensors, backend=backend)["out"]
    sizes = numbers(BF16.of_keys), numbers(BF16.sizes)
    alone = vsa.video_sparse_attn(q, k, v, *sizes, 2, 64, tensors["weight"], backend=backend)
    assert torch.equal(alone, trained)


def test_autocast_takes_mixed_types() -> None:
    tensors = CALL._replace(dtype=torch.float32).tensors()
    q, k, v = tensors["q"].bfloat16(), tensors["k"], tensors["v"]
    sizes = numbers(CALL.of_keys), numbers(CALL.sizes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = vsa.video_sparse_attn(q, k, v, *sizes, 2)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, vsa.video_sparse_attn(q, k.bfloat16(), v.bfloat16(), *sizes, 2))
    with pytest.raises(TypeError, match="k must share the dtype of q"):
        vsa.video_sparse_attn(q, k, v, *sizes, 2)


def test_forward_mode_agrees_with_reverse() -> None:
    call = CALL._replace(head_dim=8, batch=1)
    tensors = call.tensors(fill=0.0)
    sizes = numbers(call.of_keys), numbers(call.sizes)
    given = tuple(tensors[name] for name in "qkv")
    tangents = tuple(call.tensors(seed=1, fill=0.0)[name] for name in "qkv")

    def attention(*tokens: Tensor) -> Tensor:
        return vsa.video_sparse_attn(*tokens, *sizes, 2, 64, tensors["weight"])

    _, tangent = jvp(attention, given, tangents)
    leaves = [x.clone().requires_grad_() for x in given]
    upstream = tensors["grad"]
    grads = torch.autograd.grad(attention(*leaves), leaves, upstream)
    forward = (tangent * upstream).sum()
    reverse = sum((x * y).sum() for x, y in zip(grads, tangents, strict=True))
    torch.testing.assert_close(forward, reverse)


@pytest.mark.parametrize("backend", ["torch", "emulated"])
def test_products_are_counted_as_those_of_a_video(backend: str) -> None:
    """Twice two tiles of 64 and 36 tokens in a row: the same products in either form."""
    grid = vsa.Grid((1, 1, 100), tile=(1, 1, 64))
    x = torch.randn(4, 1, 100, 2, 64).bfloat16()
    padded = torch.cat((x, x[:, :, :28]), dim=2).transpose(2, 3)
    sizes = grid.sizes
    counts = []
    for tokens in (x, padded):
        q, k, v, gate = tokens.detach().clone().requires_grad_().unbind()
        with FlopCounterMode(display=False) as counter:
            if tokens is x:
                out = vsa.attention(q, k, v, 1, grid=grid, gate_coarse=gate, backend=backend)
            else:
                out = vsa.video_sparse_attn(q, k, v, sizes, sizes, 1, 64, gate, backend=backend)
            out.float().sum().backward()
        counts.append(counter.get_total_flops())
    # Two more channels of means say which tiles are empty.
    assert counts[0] <= counts[1] <= counts[0] * 1.001


def test_saved_tensors_do_not_hold_padding() -> None:
    """What a checkpoint saves are the inputs and the choice: no copy of q, k or v."""
    tensors = CALL._replace(dtype=torch.bfloat16).tensors()
    q, k, v, weight = (tensors[name].requires_grad_() for name in ("q", "k", "v", "weight"))
    held: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return x

    sizes = numbers(CALL.of_keys), numbers(CALL.sizes)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = vsa.video_sparse_attn(q, k, v, *sizes, 2, 64, weight, backend="emulated")
    given = [x.untyped_storage() for x in (q, k, v, weight)]
    more = sum(held.values()) - sum(x.nbytes() for x in given if x.data_ptr() in held)
    assert more < 2.6 * out.untyped_storage().nbytes()  # the fine stage's part, lse and means


@pytest.mark.skipif(
    BACKENDS["hopper"].why_not(Request("cuda" if torch.cuda.is_available() else "cpu")) is not None,
    reason="needs a Hopper GPU",
)
@pytest.mark.parametrize("weight", ["full", None], ids=str)
def test_a_graph_captures_it_and_nobody_waits(weight: str | None) -> None:
    call = BF16._replace(weight=weight)
    given = {name: x.cuda() for name, x in call.tensors().items()}
    sizes = numbers(call.of_keys).cuda(), numbers(call.sizes).cuda()

    def run() -> Tensor:
        tokens = (given[name] for name in "qkv")
        return vsa.video_sparse_attn(*tokens, *sizes, 2, 64, given.get("weight"))

    expected = run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
    assert not out[:, :, padding(call.sizes, 64).cuda()].any()
