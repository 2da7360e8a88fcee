# SPDX-License-Identifier: Apache-2.0
"""Eager calls of attention that a backend has prepared: found by what they depend on, and run.

Checks, grids, budgets and launches depend on shapes, strides, dtypes, devices and a few numbers,
never on what tensors hold. So the first call of a kind goes the whole way and leaves a plan under
the key of all of these; the next ones with an equal key only run it. Whatever has to see the
operators (torch.compile, fake tensors, dispatch modes, torch.func, tracing) never gets here.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from torch._C._autograd import _top_saved_tensors_default_hooks

from vsa.backends import named
from vsa.stages.inputs import DEFAULT_TILE, Inputs
from vsa.stages.planned import Plan, attend, flattened, layout
from vsa.stages.watchers import ALIGNMENT, PLAIN, is_watched, paused
from vsa.values.budget import Budget, TopP
from vsa.values.grid import Grid
from vsa.values.problem import Task
from vsa.values.remembered import Remembered
from vsa.values.score import SubBlocks

__all__ = ["attend", "kind_of", "paused", "plan_of", "remember"]

NUMBERS = (int, float, TopP, tuple)
"""Budgets whose equality says that they mean the same, together with their types."""
_plans: Remembered[Plan] = Remembered(256)


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
        rest: grid, kv_grid, tile, scale, backend, score, and whether log-sum-exp and choice are
            results.
    """
    if torch.compiler.is_compiling():
        return None
    tensors = (q, k, v) if gate_fine is gate_coarse is None else (q, k, v, gate_fine, gate_coarse)
    budget = type(topk)
    if budget not in NUMBERS or not _compares(*rest) or is_watched():
        return None
    wants, addresses = False, 0
    shapes: list[object] = []
    try:
        for x in tensors:
            if x is None:
                shapes.append(None)
                continue
            address = x.data_ptr() if type(x) in PLAIN else 0
            if not address or x.is_neg():  # see address_of, which a loop has no time for
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
    wants = wants and torch.is_grad_enabled()
    # Checkpointing gets by number what a forward saves, and its second one must save the same.
    if wants and _top_saved_tensors_default_hooks(True) is not None:
        return None
    return (*shapes, topk, kinds, *rest, wants)


def _compares(
    grid: object,
    kv_grid: object,
    tile: object,
    scale: object,
    backend: object,
    score: object,
    gives_lse: object,
    gives_choice: object,
) -> bool:
    """Whether arguments that are equal to these mean the same: 4.0 == 4, but is an error."""
    return (
        (grid is None or _is_exact(grid))
        and (kv_grid is None or _is_exact(kv_grid))
        and (tile is DEFAULT_TILE or _is_exact(tile))
        and (scale is None or type(scale) in (int, float))
        and type(backend) is str
        and type(score) in (str, SubBlocks)
        and type(gives_lse) is type(gives_choice) is bool
    )


def _is_exact(extent: object) -> bool:
    """A grid, a word, or a tuple of whole numbers."""
    if isinstance(extent, tuple):
        return {*map(type, extent)} <= {int}
    return type(extent) in (Grid, str)


def plan_of(key: Hashable) -> Plan | None:
    """The plan of a kind, None for one that is new."""
    return _plans.get(key)


def remember(
    key: Hashable,
    call: Inputs,
    budget: Budget,
    runs: int,
    gate_fine: Tensor | None,
    gate_coarse: Tensor | None,
    gives: tuple[bool, bool],
) -> None:
    """Prepare the next calls of a kind, if its backend can.

    Args:
        key: of ``kind_of``.
        call: the checked inputs of the first call.
        budget: its budget.
        runs: of a tile, whose means are scored for the choice; 1 for its mean.
        gate_fine: as the user gave it, and so is ``gate_coarse``.
        gate_coarse: see gate_fine.
        gives: whether log-sum-exp and choice are results; part of the key.
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
                runs,
                call.scale,
                gradients,
                *gives,
            )
        )
    layouts = tuple(
        None if x is None else (layout(x), layout(flattened(x)))
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
    _plans.put(key, plan)


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
