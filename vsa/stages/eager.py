# SPDX-License-Identifier: Apache-2.0
"""Eager calls of attention that a backend has prepared: found by what they depend on, and run.

Checks, grids, budgets and launches depend on shapes, strides, dtypes, devices and a few numbers,
never on what tensors hold. So the first call of a kind goes the whole way and leaves a plan under
the key of all of these; the next ones with an equal key only run it. Whatever has to see the
operators (torch.compile, fake tensors, dispatch modes, torch.func, tracing) never gets here.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from vsa.backends import named
from vsa.backends.base import Forward, Prepared
from vsa.operators import fine as operators
from vsa.stages.inputs import DEFAULT_TILE, Inputs
from vsa.values.budget import Budget, TopP
from vsa.values.grid import Grid
from vsa.values.problem import Gates, Means, Problem, Saved, Task, Upstream
from vsa.values.selection import Selection

MOST_PLANS = 256
"""Kinds of calls that are remembered; past it the oldest is forgotten."""
ALIGNMENT = 16
"""Bytes that addresses of a plan's tensors are a multiple of."""
PLAIN = (Tensor, torch.nn.Parameter)
"""Tensors that no subclass sees the operators of."""
NUMBERS = (int, float, TopP, tuple)
"""Budgets whose equality says that they mean the same, together with their types."""
Layout = tuple[object, ...]
"""Shape, strides, dtype and device of a tensor."""


class Plan(NamedTuple):
    """A kind of call.

    Attributes:
        prepared: what runs it, or None for kinds that are not prepared.
        grid: the queries' grid.
        kv_grid: the keys' grid.
        most: the most tiles of a row, where known.
        scale: factor of the scores.
        backend: name of the backend.
        gradients: whether they are wanted.
        layouts: of q, k, v, gate_fine and gate_coarse, as they were given and flat.
    """

    prepared: Prepared | None
    grid: Grid
    kv_grid: Grid
    most: int | None
    scale: float
    backend: str
    gradients: bool
    layouts: tuple[tuple[Layout, Layout] | None, ...]


_plans: dict[Hashable, Plan] = {}
_lock = threading.Lock()
_paused = 0


def _renew_lock() -> None:
    """A thread that held the lock does not exist in a forked process."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


@contextmanager
def paused() -> Iterator[None]:
    """Without plans, in the whole process: for whoever has to see each stage."""
    global _paused
    with _lock:
        _paused += 1
    try:
        yield
    finally:
        with _lock:
            _paused -= 1


def kind_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_fine: Tensor | None,
    gate_coarse: Tensor | None,
    topk: object,
    rest: Sequence[object],
) -> Hashable | None:
    """All that a call depends on besides the numbers in its tensors; None if it has no plan.

    Args:
        q: as the user gave it, and so are the other tensors.
        k: see q.
        v: see q.
        gate_fine: see q.
        gate_coarse: see q.
        topk: as the user gave it.
        rest: grid, kv_grid, tile, scale and backend.
    """
    if torch.compiler.is_compiling():
        return None
    tensors = (q, k, v) if gate_fine is gate_coarse is None else (q, k, v, gate_fine, gate_coarse)
    budget = type(topk)
    if _paused or budget not in NUMBERS or not _compares(*rest) or _is_watched():
        return None
    wants, addresses = False, 0
    shapes: list[object] = []
    try:
        for x in tensors:
            if x is None:
                shapes.append(None)
                continue
            address = x.data_ptr() if type(x) in PLAIN else 0
            if not address or x.is_neg():  # see _address, which a loop has no time for
                return None
            addresses |= address
            wants = wants or x.requires_grad
            shapes += (x.shape, x.stride(), x.dtype, x.device)
    except RuntimeError:
        return None
    if addresses % ALIGNMENT or q is None or k is None or v is None:
        return None
    device = q.device.type
    if torch.is_autocast_enabled(device):  # what it leaves alone is as without it
        cast = torch.get_autocast_dtype(device)
        if not q.dtype is k.dtype is v.dtype is cast:
            return None
    kinds: object = budget  # since 1 == 1.0, which mean one tile and all of them
    if isinstance(topk, tuple):
        kinds = tuple(map(type, topk))
        if not {*kinds} <= {int, float}:
            return None
    elif isinstance(topk, TopP):
        kinds = type(topk.floor)
    return (*shapes, topk, kinds, *rest, wants and torch.is_grad_enabled())


def _address(x: Tensor) -> int:
    """Where the numbers of a tensor lie; 0 if kernels find none there that mean what they are."""
    if type(x) not in PLAIN or x.is_neg():
        return 0
    try:
        return x.data_ptr()  # 0 on the meta device, and where memory has been freed
    except RuntimeError:  # sparse, inside of vmap, ...
        return 0


def _compares(grid: object, kv_grid: object, tile: object, scale: object, backend: object) -> bool:
    """Whether arguments that are equal to these mean the same: 4.0 == 4, but is an error."""
    return (
        (grid is None or _is_exact(grid))
        and (kv_grid is None or _is_exact(kv_grid))
        and (tile is DEFAULT_TILE or _is_exact(tile))
        and (scale is None or type(scale) in (int, float))
        and type(backend) is str
    )


def _is_exact(extent: object) -> bool:
    """A grid, a word, or a tuple of whole numbers."""
    if isinstance(extent, tuple):
        return {*map(type, extent)} <= {int}
    return type(extent) in (Grid, str)


def _is_watched() -> bool:
    """Whether a mode, a transform or a trace has to see the operators."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or (torch._C._len_torch_function_stack() > 0 and _has_function_mode())
        or forward_ad._current_level >= 0
        or _functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )


def _has_function_mode() -> bool:
    """Whether a mode sees functions, other than that of ``torch.set_default_device``."""
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def plan_of(key: Hashable) -> Plan | None:
    """The plan of a kind, None for one that is new."""
    return _plans.get(key)


def remember(
    key: Hashable,
    call: Inputs,
    budget: Budget,
    gate_fine: Tensor | None,
    gate_coarse: Tensor | None,
) -> None:
    """Prepare the next calls of a kind, if its backend can.

    Args:
        key: of ``kind_of``.
        call: the checked inputs of the first call.
        budget: its budget.
        gate_fine: as the user gave it, and so is ``gate_coarse``.
        gate_coarse: see gate_fine.
    """
    gates = [_flat_gate(gate, call) for gate in (gate_fine, gate_coarse)]
    prepared = None
    wanted = [x for x in (call.q, call.k, call.v, *gates) if x is not None]
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in wanted)
    if _in_place(call, gate_fine, gate_coarse, gates) and budget.numbers is None:
        prepared = named(call.backend).prepare(
            Task(
                call.q,
                call.k,
                call.v,
                gates[0],
                gates[1],
                call.grid,
                call.kv_grid,
                tuple(budget.counts),
                budget.mass,
                call.scale,
                gradients,
            )
        )
    layouts = tuple(
        None if x is None else (_layout(x), _layout(_flat(x)))
        for x in (*call.given, gate_fine, gate_coarse)
    )
    plan = Plan(
        prepared,
        call.grid,
        call.kv_grid,
        budget.most,
        call.scale,
        call.backend,
        gradients,
        layouts,
    )
    with _lock:
        while len(_plans) >= MOST_PLANS:
            del _plans[next(iter(_plans))]
        _plans[key] = plan


def _flat_gate(gate: Tensor | None, call: Inputs) -> Tensor | None:
    """A gate as the kernels read it where it is, or the gate itself where they do not."""
    if gate is None or gate.shape != call.shape or not _folds(gate):
        return gate
    return gate.flatten(1, 3) if gate.ndim == 6 else gate


def _folds(x: Tensor) -> bool:
    """Whether (B, T, H, W, heads, head_dim) is (B, S, heads, head_dim) without a copy."""
    if x.ndim != 6:
        return True
    _, t, h, w = x.stride()[:4]
    _, _, height, width = x.shape[:4]
    return h == width * w and t == height * h


def _in_place(
    call: Inputs,
    gate_fine: Tensor | None,
    gate_coarse: Tensor | None,
    flat: Sequence[Tensor | None],
) -> bool:
    """Whether kernels read all tensors where the user has them."""
    if call.text_valid is not None or not all(map(_folds, call.given)):
        return False
    for gate, view in zip((gate_fine, gate_coarse), flat, strict=True):
        if gate is None:
            continue
        dtypes = (call.q.dtype, torch.float32)
        if view is None or view.ndim != 4 or gate.shape != call.shape or 0 in gate.stride():
            return False
        if gate.dtype not in dtypes:
            return False
    return all(x.dtype == call.q.dtype for x in call.given)


def attend(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_fine: Tensor | None,
    gate_coarse: Tensor | None,
) -> tuple[Tensor, Tensor, Selection]:
    """Run a plan that is prepared: out like q, lse (B, heads, S_q), and the choice."""
    assert plan.prepared is not None
    device = q.device.type
    casts = torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if casts else nullcontext():
        if not plan.gradients:
            out, lse, bitmap, *_ = plan.prepared.forward(q, k, v, gate_fine, gate_coarse)
        elif q.ndim == 6 and _top_saved_tensors_default_hooks(True) is not None:
            flat = (None if x is None else _flat(x) for x in (q, k, v, gate_fine, gate_coarse))
            out, lse, bitmap = _Attention.apply(plan, *flat)
            out = out.view(q.shape)
        else:
            out, lse, bitmap = _Attention.apply(plan, q, k, v, gate_fine, gate_coarse)
    choice = Selection(bitmap, plan.kv_grid.num_tiles, plan.grid, plan.kv_grid, plan.most)
    return out, lse, choice


class _Attention(torch.autograd.Function):
    """The whole of attention for autograd.

    It saves what the operators save, in their order and, where hooks see it, in their shapes:
    checkpointing may run one forward with a plan and the other without, and hands on what it saved
    by number.
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        assert plan.prepared is not None
        found = plan.prepared.forward(*tensors)  # type: ignore[arg-type]
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(found.bitmap)
        q, k, v, *gates = tensors
        ctx.save_for_backward(
            found.fine, found.lse, q, k, v, found.bitmap, *found.means, *gates, found.coarse
        )
        return found.out, found.lse, found.bitmap

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: Any) -> Any:
        plan: Plan = ctx.plan
        fine, lse, q, k, v, bitmap, *means, gate_fine, gate_coarse, coarse = ctx.saved_tensors
        tensors = q, k, v, gate_fine, gate_coarse
        found = Forward(fine, lse, bitmap, fine, coarse, Means(*means))
        grad_out = torch.zeros_like(fine) if grad_out is None else grad_out.contiguous()
        if grad_lse is not None:
            grad_lse = grad_lse.float().contiguous()
        upstream = Upstream(grad_out, grad_lse)
        if _needs_operators() or not _as_planned(plan, tensors, found, upstream):
            return None, *_by_operators(plan, upstream, found, tensors)
        assert plan.prepared is not None
        return None, *plan.prepared.backward(upstream, found, tensors)


def _needs_operators() -> bool:
    """Whether the operators of a backward have to be seen, or differentiated again."""
    return (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or _paused > 0
        or _is_watched()
    )


def _as_planned(
    plan: Plan, tensors: Sequence[Tensor | None], found: Forward, upstream: Upstream
) -> bool:
    """Whether kernels can read all of these where they are.

    Tensors come back from autograd as they were saved, but for hooks, which may have copied them.
    Gradients come from anywhere.
    """
    for x, layouts in zip(tensors, plan.layouts, strict=True):
        if x is not None and (layouts is None or _layout(x) not in layouts):
            return False
    q = tensors[0]
    assert q is not None
    dtypes = (
        *((x, q.dtype) for x in (found.fine, upstream.grad_out)),
        (found.bitmap, torch.int32),
        *((x, torch.float32) for x in (found.lse, found.coarse, *found.means, upstream.grad_lse)),
    )
    addresses = [_address(x) for x in (*tensors, *(x for x, _ in dtypes)) if x is not None]
    return all(each and each % ALIGNMENT == 0 for each in addresses) and all(
        x is None or (x.dtype is dtype and x.device == q.device and x.is_contiguous())
        for x, dtype in dtypes
    )


def _layout(x: Tensor) -> Layout:
    return x.shape, x.stride(), x.dtype, x.device


def _by_operators(
    plan: Plan, upstream: Upstream, found: Forward, tensors: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients by the operators, which take any strides and can be differentiated no more."""
    q, k, v, gate_fine, gate_coarse = (None if x is None else _flat(x) for x in tensors)
    assert q is not None and k is not None and v is not None
    ints = plan.grid.as_ints(), plan.kv_grid.as_ints()
    problem = Problem(q, k, v, found.bitmap, None, *ints, plan.scale, plan.backend)
    flat = Upstream(_flat(upstream.grad_out), upstream.grad_lse)
    saved = Saved(_flat(found.fine), found.lse)
    if gate_fine is None and gate_coarse is None:
        most = plan.kv_grid.num_tiles if plan.most is None else plan.most
        grads = operators.block_sparse_attention_backward(*flat, *saved, *problem, most)
    else:
        gates = Gates(gate_fine, gate_coarse, found.coarse)
        grads = operators.gated_attention_backward(*flat, *saved, *problem, *found.means, *gates)
    each = zip(tensors, (*grads, None, None), strict=False)
    return [None if x is None or grad is None else grad.view(x.shape) for x, grad in each]


def _flat(x: Tensor) -> Tensor:
    # No flatten: torch.autograd.grad with is_grads_batched has no rule for it.
    return x.reshape(x.shape[0], -1, *x.shape[4:]) if x.ndim == 6 else x
