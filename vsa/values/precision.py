# SPDX-License-Identifier: Apache-2.0
"""What ``precision=`` may be, and what it asks of a call's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from vsa.values import checks, transforms

Precision = Literal["native", "int8", "fp8"]
PRECISIONS = ("native", "int8", "fp8")
DTYPES = (torch.bfloat16, torch.float16)
"""Of q, k and v in low precision."""
HEAD_DIMS = (64, 128)


def named(value: object) -> str:
    """One of ``PRECISIONS``.

    Raises:
        ValueError: for anything else.
    """
    if not isinstance(value, str) or value not in PRECISIONS:
        allowed = ", ".join(f'"{name}"' for name in PRECISIONS[:-1]) + f' or "{PRECISIONS[-1]}"'
        raise ValueError(f"precision must be {allowed}, but it is {value!r:.60}")
    return value


def check(precision: str, q: Tensor, tensors: Mapping[str, Tensor | None]) -> None:
    """What low precision takes: 16 bits, the kernels' head_dims, and no derivatives.

    Args:
        precision: of ``named``.
        q: in the type that is computed with.
        tensors: q, k, v and the gates by their names, as the user gave them.

    Raises:
        TypeError: q of another type.
        ValueError: another head_dim, or a tensor that wants a gradient.
        NotImplementedError: a tensor inside of a transform of torch.func, or with a tangent.
    """
    if precision == "native":
        return
    if q.dtype not in DTYPES:
        raise TypeError(
            f"q must be bf16 or fp16 for precision={precision!r}, but it is {q.dtype}, which "
            'precision="native" takes'
        )
    if q.shape[-1] not in HEAD_DIMS:
        allowed = " or ".join(map(str, HEAD_DIMS))
        raise ValueError(
            f"q must have a head_dim of {allowed} for precision={precision!r}, but its head_dim "
            f"is {q.shape[-1]}"
        )
    for name, x in tensors.items():
        if not isinstance(x, Tensor):  # gates are checked elsewhere
            continue
        if transforms.is_transformed(x):
            raise NotImplementedError(
                f"{name} has a forward-mode tangent or is inside of a transform of torch.func, "
                f'which precision={precision!r} does not follow: leave it "native"'
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} wants a gradient, but precision={precision!r} is for inference: call it "
                'under torch.no_grad(), or leave it "native"'
            )


def check_tail(precision: str, tail: bool) -> None:
    """Whether a tail is a flag, and one that this precision has.

    Raises:
        TypeError: no flag.
        ValueError: a tail in low precision.
    """
    if checks.flag("tail", tail) and precision != "native":
        raise ValueError(f"tail must be False for precision={precision!r}, but it is True")
