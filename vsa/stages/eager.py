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
from vsa.stages.forms import Tokens, brought_into, forms_of
from vsa.stages.inputs import DEFAULT_TILE, Inputs, wants_gradients
from vsa.stages.planned import Plan, attend, flattened, layout
from vsa.stages.watchers import ALIGNMENT, PLAIN, is_watched, paused
from vsa.values.budget import Budget, LayerBudget, TopP
from vsa.values.grid import Grid
from vsa.values.masks import RULES
from vsa.values.remembered import Remembered
from vsa.values.ring import Ring
from vsa.values.score import SubBlocks
from vsa.values.selection import Selection
from vsa.values.task import NO_PADDING, Task
from vsa.values.transforms import must_be_copied

__all__ = ["attend", "is_hooked", "keep", "kind_of", "paused", "plan_of", "remember"]

NUMBERS = (int, float, TopP, LayerBudget, tuple)
"""Budgets whose equality says that they mean the same, together with their types."""
ALIGNED = False, False, False
_plans: Remembered[Plan] = Remembered(256)


def kind_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_fine: Tensor | None,
    gate_coarse: Tensor | None,
    text_valid: Tensor | None,
    selection: Selection | None,
    topk: object,
    rest: Sequence[object],
    of_cache: Hashable | None = (),
) -> Hashable | None:
    """All that a call depends on besides the numbers in its tensors; None if it has no plan.

    Args:
        q: as the user gave it, and so are the other tensors.
        k: see q.
        v: see q.
        gate_fine: see q.
        gate_coarse: see q.
        text_valid: see q.
        selection: see q.
        topk: as the user gave it.
        rest: grid, kv_grid, tile, scale, backend, score, whether log-sum-exp and choice are
            results, whether there is a tail, the mask, and the precision.
        of_cache: what the call depends on of its cache, or of what else it has; None if that says
            that it has no plan.
    """
    if torch.compiler.is_compiling() or of_cache is None:
        return None
    tensors: tuple[Tensor | None, ...] = (q, k, v)
    if not gate_fine is gate_coarse is text_valid is None:
        tensors = q, k, v, gate_fine, gate_coarse, text_valid
    budget = type(topk)
    if not _compares(*rest) or is_watched():
        return None
    low = rest[-1] != "native"
    if selection is not None:
        known = _known_of(selection)
        if known is None:
            return None
        tensors, rest = (*tensors, selection.bitmap), (*rest, *known)
    if budget not in NUMBERS and (selection is None or topk is not None):
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
    if q is None or k is None or v is None:
        return None
    misaligned = _misaligned(q, k, v) if addresses % ALIGNMENT else ALIGNED
    if len(tensors) > 4:
        rest = *rest, *(x is not None and x.requires_grad for x in (gate_fine, gate_coarse))
        rest = *rest, text_valid is not None and must_be_copied(text_valid)
    device, cast = q.device.type, None
    if torch.is_autocast_enabled(device):
        cast = torch.get_autocast_dtype(device)
        if q.dtype is k.dtype is v.dtype is cast:  # what it leaves alone is as without it
            cast = None
    kinds: object = budget  # since 1 == 1.0, which mean one tile and all of them
    if isinstance(topk, tuple):
        kinds = tuple(map(type, topk))
        if not {*kinds} <= {int, float}:
            return None
    elif isinstance(topk, TopP):
        kinds = type(topk.floor)
    wants = wants and torch.is_grad_enabled()
    if wants and low:  # refused elsewhere
        return None
    hooked = wants and is_hooked()
    return (*shapes, topk, kinds, *rest, cast, misaligned, wants, hooked, of_cache)


def _known_of(selection: Selection) -> tuple[object, ...] | None:
    """What a call depends on of a selection besides its bitmap's layout; None if it has no plan."""
    if type(selection) is not Selection or type(selection.bitmap) not in PLAIN:
        return None
    known = selection.num_key_tiles, selection.grid, selection.kv_grid
    if type(known[0]) is not int or not {*map(type, known[1:])} <= {Grid, type(None)}:
        return None
    under = selection.under
    if under is not None and under.allowed is not None:
        return None
    return *known, under, must_be_copied(selection.bitmap)


def is_hooked() -> bool:
    """Whether hooks see what autograd saves."""
    return _top_saved_tensors_default_hooks(True) is not None


def _misaligned(q: Tensor, k: Tensor, v: Tensor) -> tuple[bool, bool, bool]:
    """Which of these kernels cannot read where they are."""
    first, second, third = (x.data_ptr() % ALIGNMENT != 0 for x in (q, k, v))
    return first, second, third


def _compares(
    grid: object,
    kv_grid: object,
    tile: object,
    scale: object,
    backend: object,
    score: object,
    gives_lse: object,
    gives_choice: object,
    tail: object,
    mask: object,
    precision: object,
) -> bool:
    """Whether arguments that are equal to these mean the same: 4.0 == 4, but is an error."""
    return (
        (grid is None or _is_exact(grid))
        and (kv_grid is None or _is_exact(kv_grid))
        and (tile is DEFAULT_TILE or _is_exact(tile))
        and (scale is None or type(scale) in (int, float))
        and type(backend) is type(precision) is str
        and type(score) in (str, SubBlocks)
        and (mask is None or type(mask) in RULES)
        and type(gives_lse) is type(gives_choice) is type(tail) is bool
    )


def _is_exact(extent: object) -> bool:
    """A grid, a word, or a tuple of whole numbers."""
    if isinstance(extent, tuple):
        return {*map(type, extent)} <= {int}
    return type(extent) in (Grid, str)


def keep(key: Hashable, plan: Plan) -> None:
    """Remember the plan of a kind."""
    _plans.put(key, plan)


def plan_of(key: Hashable) -> Plan | None:
    """The plan of a kind, None for one that is new."""
    return _plans.get(key)


def remember(
    key: Hashable,
    call: Inputs,
    given: Tokens,
    choice: Budget | Selection,
    gives: tuple[bool, bool],
    tail: bool = False,
    everything: bool = False,
    runs: int = 1,
    ring: Ring | None = None,
) -> None:
    """Prepare the next calls of a kind, if its backend can.

    Args:
        key: of ``kind_of``.
        call: the checked inputs of the first call.
        given: q, k, v, gate_fine and gate_coarse as the user gave them.
        choice: the budget, or the selection that the first call went by.
        gives: whether log-sum-exp and choice are results; part of the key, and so is ``tail``.
        tail: whether tiles that are not chosen enter the softmax by their means.
        everything: whether that selection is all tiles, which no user gave.
        runs: of a tile, whose means are scored for the choice; 1 for its mean.
        ring: of the call's cache; then k and v are the current chunk's.
    """
    gradients = wants_gradients(*given)
    hooked = gradients and is_hooked()
    forms = forms_of(call, given)
    q, k, v, *gates = tokens = brought_into(forms, given)
    counts: Sequence[int] = ()
    shares: Sequence[float] = ()
    mass, most, bitmap, is_constant = 0.0, None, None, True
    if isinstance(choice, Selection):
        bitmap = choice.bitmap
    else:
        counts, mass, most = tuple(choice.counts), choice.mass, choice.most
        is_constant, shares = choice.numbers is None, choice.shares
    prepared = None
    saves_as_operators = not (tail and hooked)
    if is_constant and saves_as_operators and all(x.dtype == call.q.dtype for x in call.given):
        task = Task(
            flattened(q),
            flattened(k),
            flattened(v),
            None if gates[0] is None else flattened(gates[0]),
            None if gates[1] is None else flattened(gates[1]),
            call.text_valid,
            bitmap,
            call.grid,
            call.kv_grid,
            counts,
            mass,
            runs,
            call.scale,
            gradients,
            gives[0] or hooked,
            gives[1] or hooked,
            _misaligned(q, k, v),
            tail,
            call.precision,
            () if call.mask is None else call.mask.rule,
            () if call.mask is None else shares,
            ring,
        )
        prepared = named(call.backend).prepare(task)
    layouts = tuple(
        None if x is None else (layout(x), layout(flattened(x)))
        for x in (*tokens, call.text_valid, bitmap, *NO_PADDING)
    )
    plan = Plan(
        prepared,
        call.grid,
        call.kv_grid,
        most,
        call.scale,
        call.backend,
        gradients,
        layouts,
        forms,
        everything,
        hooked,
        tail,
        call.mask,
    )
    keep(key, plan)
