# SPDX-License-Identifier: Apache-2.0
"""The forms in which kernels read tensors, brought about by operators that autograd follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vsa.stages import inputs
from vsa.stages.inputs import Inputs

Tokens = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
"""q, k, v, gate_fine and gate_coarse."""
Tensors = Sequence[Tensor | None]
"""Those, text_valid, and the bitmap of a given selection."""


class Forms(NamedTuple):
    """What becomes of a call's tensors before the kernels; nothing, for most kinds of calls.

    Attributes:
        cast: the type that q, k and v get under autocast, or None.
        unfolded: which of q, k and v have video axes whose strides do not fold into one.
        broadcast: whether gate_fine and gate_coarse are there, but not read where they are.
    """

    cast: torch.dtype | None
    unfolded: tuple[bool, bool, bool]
    broadcast: tuple[bool, bool]


AS_GIVEN = Forms(None, (False, False, False), (False, False))


def forms_of(call: Inputs, tokens: Tokens) -> Forms:
    """What calls of this kind need; tensors as the user gave them."""
    changed = any(x is not y for x, y in zip(tokens, call.given, strict=False))
    q, k, v = call.given
    return Forms(
        call.q.dtype if changed else None,
        (not _folds(q), not _folds(k), not _folds(v)),
        (_is_broadcast(tokens[3], call), _is_broadcast(tokens[4], call)),
    )


def brought_into(forms: Forms, tokens: Tokens) -> Tokens:
    """Tensors in these forms: views where strides allow."""
    q, k, v, gate_fine, gate_coarse = tokens
    shape, dtype = q.shape, forms.cast or q.dtype
    if forms.cast is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if any(forms.unfolded):
        each = zip((q, k, v), forms.unfolded, strict=True)
        q, k, v = (x.contiguous() if unfolded else x for x, unfolded in each)
    if gate_fine is not None and forms.broadcast[0]:
        gate_fine = gate_like_q(gate_fine, shape, dtype)
    if gate_coarse is not None and forms.broadcast[1]:
        gate_coarse = gate_like_q(gate_coarse, shape, dtype)
    return q, k, v, gate_fine, gate_coarse


def gate_like_q(gate: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A gate in the flat shape of q: a view, whose gradient PyTorch sums over what was broadcast.

    One that is broadcast and wants a gradient goes in fp32, so that the terms of that sum are not
    rounded.

    Args:
        gate: as the user gave it.
        shape: of q as the user gave it.
        dtype: of q.
    """
    sums = inputs.wants_gradients(gate) and (gate.shape != shape or 0 in gate.stride())
    gate = gate.float() if sums or gate.dtype != dtype else gate
    return gate.expand(shape).reshape(shape[0], -1, *shape[-2:])


def _folds(x: Tensor) -> bool:
    """Whether (B, T, H, W, heads, head_dim) is (B, S, heads, head_dim) without a copy."""
    if x.ndim != 6:
        return True
    _, t, h, w = x.stride()[:4]
    _, _, height, width = x.shape[:4]
    return h == width * w and t == height * h


def _is_broadcast(gate: Tensor | None, call: Inputs) -> bool:
    """Whether there is a gate that kernels do not read where the user has it."""
    return gate is not None and not (
        gate.shape == call.shape
        and 0 not in gate.stride()
        and gate.dtype in (call.q.dtype, torch.float32)
        and _folds(gate)
    )
