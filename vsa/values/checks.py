# SPDX-License-Identifier: Apache-2.0
"""Argument checks. Every error is one sentence: which argument, what it was, what is allowed."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from vsa.values import transforms

SYMBOLS = (torch.SymInt, torch.SymFloat)
"""What numbers may be while torch.compile or torch.export traces a call."""
MOST_HEADS = 256
"""More heads than any model has: more of them than tokens are an axis in the wrong place."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def integer(name: str, value: object, at_least: int) -> int:
    """A whole number of at least ``at_least``; one that is a symbol while tracing stays one."""
    # The first question is the quick one; the last is slow and for NumPy's numbers and the like.
    if type(value) is not int and not isinstance(value, torch.SymInt):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(
                f"{name} must be a whole number, but it is {value!r} of type {type(value).__name__}"
            )
        value = operator.index(value)
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, but it is {value}")
    return value  # type: ignore[return-value]


def flag(name: str, value: object) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(
            f"{name} must be True or False, but it is {value!r:.60} of type {type(value).__name__}"
        )
    return value


def count(name: str, value: object) -> int:
    """A number of things, zero allowed."""
    return integer(name, value, at_least=0)


def extent(name: str, value: object) -> tuple[int, int, int]:
    """Three positive token counts along (t, h, w)."""
    if not isinstance(value, (tuple, list)) or len(value) != 3:
        raise TypeError(f"{name} must be three token counts (t, h, w), but it is {value!r}")
    t, h, w = value
    if type(t) is type(h) is type(w) is int and t > 0 and h > 0 and w > 0:  # the quick question
        return t, h, w
    return (
        integer(f"{name}[0]", t, at_least=1),
        integer(f"{name}[1]", h, at_least=1),
        integer(f"{name}[2]", w, at_least=1),
    )


def tile(name: str, value: object, most: int) -> tuple[int, int, int]:
    """A tile shape of at most ``most`` tokens."""
    if isinstance(value, str):
        raise ValueError(
            f'{name} must be "auto" or three token counts (t, h, w), but it is {value!r}'
        )
    shape = extent(name, value)
    if math.prod(shape) > most:
        raise ValueError(
            f"{name} must hold at most {most} tokens, but {shape} holds {math.prod(shape)}"
        )
    return shape


def top_k(topk: object, num_tiles: int, name: str = "topk") -> int:
    """Key tiles that ``topk`` keeps of ``num_tiles``: an int is clamped, a float is a share."""
    if isinstance(topk, bool) or not isinstance(topk, (*SYMBOLS, numbers.Real)):
        more = ", a vsa.TopP or a tuple with one of these numbers per head" * (name == "topk")
        raise TypeError(
            f"{name} must be an int (key tiles) or a float in (0, 1] (share of them){more}, "
            f"but it is {topk!r:.60} of type {type(topk).__name__}"
        )
    if isinstance(topk, (torch.SymInt, numbers.Integral)):
        return min(integer(name, topk, at_least=1), num_tiles)
    value = float(topk)
    if not 0 < value <= 1:
        raise ValueError(
            f"{name} as a float is a share of the key tiles in (0, 1], but it is {topk}"
        )
    return max(1, math.ceil(value * num_tiles))


def plain_number(value: float) -> float:
    """A real number as Python's own int or float, which files keep; a symbol stays one."""
    if isinstance(value, SYMBOLS):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def number_tensor(name: str, value: Tensor) -> None:
    """A tensor () on the CPU: one number that is read without waiting for a device."""
    kinds = (torch.bool, torch.complex64, torch.complex128)
    if value.ndim or value.device.type != "cpu" or value.dtype in kinds:
        raise ValueError(
            f"{name} as a tensor must be a single number on the CPU, but it is {value.dtype} of "
            f"the shape {tuple(value.shape)} on {value.device}"
        )


def share(name: str, value: object) -> float:
    """A number in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"{name} must be a number in (0, 1], but it is {value!r:.60} "
            f"of type {type(value).__name__}"
        )
    if not 0 < float(value) <= 1:
        raise ValueError(f"{name} must be a number in (0, 1], but it is {value}")
    return float(value)


def one_per_head(name: str, values: Sequence[object], heads: int) -> None:
    """As many values as query heads."""
    if len(values) != heads:
        raise ValueError(
            f"{name} as a tuple must have one number per query head, but it has {len(values)} "
            f"for {heads} heads"
        )


def not_empty(name: str, values: Sequence[object]) -> None:
    """At least one value in a tuple or list."""
    if not isinstance(values, (tuple, list)) or not values:
        raise ValueError(
            f"{name} must be a tuple or list of at least one, but it is {values!r:.60}"
        )


def scale(value: object, head_dim: int) -> float:
    """The factor of the scores, by default head_dim ** -0.5."""
    if value is None:
        return head_dim**-0.5
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"scale must be a number or None, but it is {value!r} of type {type(value).__name__}"
        )
    if not math.isfinite(value):
        raise ValueError(f"scale must be a finite number, but it is {value}")
    return float(value)


def tensor(name: str, value: object) -> Tensor:
    """A floating-point tensor of a type that attention accepts."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, but it is {_described(value)}")
    if value.dtype not in DTYPES:
        raise TypeError(
            f"{name} must be bfloat16, float16, float32 or float64, but it is {value.dtype}"
        )
    return value


def _described(value: object) -> str:
    """What stands in the place of a tensor, without the numbers in it."""
    kind = type(value)
    if hasattr(value, "shape"):
        return f"a {kind.__module__.partition('.')[0]}.{kind.__name__} of shape {value.shape}"
    if isinstance(value, (list, tuple)):
        return f"a {kind.__name__} of length {len(value)}"
    return f"{value!r:.40} of type {kind.__name__}"


def plain(name: str, x: Tensor) -> None:
    """A tensor of numbers, none of whose axes is hidden."""
    if torch.compiler.is_compiling():
        return
    if x.device.type == "meta":
        raise ValueError(
            f"{name} must hold numbers, but it is on the meta device: use FakeTensorMode or "
            "torch.compile to find shapes"
        )
    if transforms.is_batched(x):
        raise NotImplementedError(
            f"{name} is inside of torch.func.vmap, which vsa does not support: give the axis to "
            "the batch instead"
        )


def layout(name: str, x: Tensor) -> None:
    """Video-shaped or flat, and not empty."""
    if x.ndim not in (4, 6):
        raise ValueError(
            f"{name} must be (B, T, H, W, heads, head_dim) or (B, S, heads, "
            f"head_dim), but its shape is {tuple(x.shape)}"
        )
    if 0 in x.shape:
        raise ValueError(f"{name} must not be empty, but its shape is {tuple(x.shape)}")
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(
            f"{name} must have a contiguous last dimension (head_dim), but its "
            f"strides are {tuple(x.stride())}"
        )
    # A small number of heads, as models have it, is asked about first: it is no symbol.
    if x.ndim == 4 and x.shape[2] >= MOST_HEADS and x.shape[2] > x.shape[1]:
        raise ValueError(
            f"{name} must be (B, S, heads, head_dim), but its shape {tuple(x.shape)} has more "
            "heads than tokens: pass x.transpose(1, 2) if it is (B, heads, S, head_dim)"
        )


def alike(q: Tensor, others: dict[str, Tensor]) -> None:
    """Same type and device as q."""
    for name, x in others.items():
        if x.dtype != q.dtype:
            raise TypeError(
                f"{name} must share the dtype of q, but {name} is {x.dtype} and q is {q.dtype}"
            )
        if x.device != q.device:
            raise ValueError(
                f"{name} must share the device of q, but {name} is on {x.device} and "
                f"q is on {q.device}"
            )


def keys_match(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Keys fit queries and values fit keys, each (B, ..., heads, head_dim)."""
    if v.shape != k.shape:
        raise ValueError(
            f"v must have the shape of k, but v is {tuple(v.shape)} and k is {tuple(k.shape)}"
        )
    if k.ndim != q.ndim:
        raise ValueError(
            f"k must be video-shaped or flat like q, but k is {tuple(k.shape)} and q "
            f"is {tuple(q.shape)}"
        )
    if k.shape[0] != q.shape[0] or k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"k must have the batch and head_dim of q, but k is {tuple(k.shape)} and "
            f"q is {tuple(q.shape)}"
        )
    if q.shape[-2] % k.shape[-2]:
        raise ValueError(
            "k must have a number of heads that divides the heads of q, but k has "
            f"{k.shape[-2]} and q has {q.shape[-2]}"
        )


def gate(name: str, value: Tensor | None, q: Tensor) -> None:
    """None, or a floating-point tensor that broadcasts to q."""
    if value is None:
        return
    plain(name, tensor(name, value))
    fits = value.ndim <= q.ndim
    for size, whole in zip(value.shape[::-1], q.shape[::-1], strict=False):
        fits = fits and (size == 1 or size == whole)
    if not fits:
        raise ValueError(
            f"{name} must be broadcastable to q, but it is {tuple(value.shape)} and q "
            f"is {tuple(q.shape)}"
        )
    if value.device != q.device:
        raise ValueError(
            f"{name} must share the device of q, but it is on {value.device} and q is on {q.device}"
        )


def tokens(name: str, x: Tensor, dim: int) -> None:
    """(B, T, H, W, dim) or (B, S, dim)."""
    tensor(name, x)
    if x.ndim not in (3, 5) or x.shape[-1] != dim:
        raise ValueError(
            f"{name} must be (B, T, H, W, {dim}) or (B, S, {dim}), but its shape is "
            f"{tuple(x.shape)}"
        )
