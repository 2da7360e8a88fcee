# SPDX-License-Identifier: Apache-2.0
"""What ``precision=`` may be, and what it asks of a call's tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from vsa.values import checks, transforms

Precision = Literal["native", "int8", "fp8"]
PRECISIONS: tuple[Precision, ...] = ("native", "int8", "fp8")
DTYPES = (torch.bfloat16, torch.float16)
"""Of q, k and v in low precision."""
HEAD_DIMS = (64, 128)
LayerPrecision = Precision | Sequence[Precision] | Callable[[int, int], Precision]
"""Of all layers of a model: one for all, one for each, or a function precision(layer, step)."""


_ALLOWED = ", ".join(f'"{name}"' for name in PRECISIONS[:-1]) + f' or "{PRECISIONS[-1]}"'


def named(value: object) -> Precision:
    """One of ``PRECISIONS``.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, str):
        for name in PRECISIONS:
            if value == name:
                return name
    raise ValueError(f"precision must be {_ALLOWED}, but it is {value!r:.60}")


def of_layers(value: object, layers: int) -> LayerPrecision:
    """What ``apply_vsa`` takes; a list of one for each layer becomes a tuple.

    Args:
        value: see ``LayerPrecision``.
        layers: how many there are.

    Raises:
        TypeError: none of these.
        ValueError: a list of another length, or a name that is no precision.
    """
    if isinstance(value, str):
        return named(value)
    if callable(value):
        return value
    if not isinstance(value, (list, tuple)):
        raise TypeError(
            f"precision must be {_ALLOWED}, a list with one of these for each layer, or a function "
            f"precision(layer, step), but it is a {type(value).__name__}"
        )
    if len(value) != layers:
        raise ValueError(
            f"precision must have one name for each of the {layers} layers, but it has {len(value)}"
        )
    for layer, each in enumerate(value):
        if each not in PRECISIONS:
            raise ValueError(
                f"precision must be {_ALLOWED} in every layer, but it is {each!r:.60} in layer "
                f"{layer}"
            )
    return tuple(value)


def in_layer(value: LayerPrecision, layer: int, step: int) -> Precision:
    """The precision of one layer in one step.

    Args:
        value: of ``of_layers``.
        layer: number of the layer.
        step: number of the denoising step.

    Raises:
        ValueError: a function that returns something else.
    """
    if callable(value):
        found = value(layer, step)
        if found not in PRECISIONS:
            raise ValueError(
                f"precision must return {_ALLOWED}, but in layer {layer} and step {step} it "
                f"returns {found!r:.60}"
            )
        return found
    return value if isinstance(value, str) else value[layer]


def in_any_layer(value: LayerPrecision) -> frozenset[Precision]:
    """All that are known before a model runs; none of a function's."""
    if callable(value):
        return frozenset()
    return frozenset((value,) if isinstance(value, str) else value)


def check(precision: str, q: Tensor, tensors: Mapping[str, Tensor | None]) -> None:
    """What low precision takes: 16 bits, the kernels' head_dims, and no derivatives.

    Args:
        precision: "int8" or "fp8".
        q: in the type that is computed with.
        tensors: q, k, v and the gates by their names, as the user gave them.

    Raises:
        TypeError: q of another type.
        ValueError: another head_dim, or a tensor that wants a gradient.
        NotImplementedError: a tensor inside of a transform of torch.func, or with a tangent.
    """
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
