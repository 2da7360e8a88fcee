# SPDX-License-Identifier: Apache-2.0
"""What callers of the drop-ins pass, checked and brought into the form that operators take."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vsa.stages import inputs
from vsa.values import bitmap, checks, padded
from vsa.values.grid import SLOTS
from vsa.values.problem import PaddedProblem

VOLUMES = (64, 128, 256)
"""Slots that a tile may have: one, two or four of ours."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """Checked inputs over padded tiles.

    Attributes:
        q: (B, S_q, heads, head_dim), in slots.
        k: (B, S_k, kv_heads, head_dim).
        v: like k.
        sizes: (n_q,) int32, real tokens of each of the caller's query tiles.
        kv_sizes: (n_k,) int32, the same of the keys.
        parts: tiles of 64 slots in one of the caller's: 1, 2 or 4.
        scale: factor of the scores.
        backend: name of the backend, never "auto".
    """

    q: Tensor
    k: Tensor
    v: Tensor
    sizes: Tensor
    kv_sizes: Tensor
    parts: int
    scale: float
    backend: str

    def problem(self, chosen: Tensor) -> PaddedProblem:
        """The fine stage over tiles of 64 slots.

        What holds no token is left out of the choice: it has nothing to give and nothing to ask.

        Args:
            chosen: (B, heads, n_q, words) int32, the choice among the caller's tiles.
        """
        sizes = padded.sizes_of_parts(self.sizes, self.parts)
        kv_sizes = padded.sizes_of_parts(self.kv_sizes, self.parts)
        if self.parts > 1:
            kept = bitmap.unpack(chosen, len(self.kv_sizes)).repeat_interleave(self.parts, dim=-1)
            chosen = bitmap.pack(kept).repeat_interleave(self.parts, dim=-2)
        chosen = torch.where(sizes[:, None] > 0, chosen & bitmap.pack(kv_sizes > 0), 0)
        return PaddedProblem(
            self.q, self.k, self.v, chosen, sizes, kv_sizes, self.scale, self.backend
        )


def resolve(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    volume: int,
    sizes: Tensor | None,
    kv_sizes: Tensor,
    gate: Tensor | None = None,
    validate: bool = False,
    backend: str = "auto",
) -> Inputs:
    """Check what the drop-ins have in common.

    Args:
        q: (B, heads, S_q, head_dim), and k and v (B, kv_heads, S_k, head_dim).
        k: see q.
        v: see q.
        volume: slots of a tile.
        sizes: (n_q,) integers, or None where all query rows are real.
        kv_sizes: (n_k,) integers.
        gate: compress_attn_weight, which may want a gradient too.
        validate: whether numbers in tensors on a GPU are read, which waits for it.
        backend: as in ``vsa.attention``.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what is allowed.
        RuntimeError: an explicit backend that cannot run here.
    """
    checks.flag("validate", validate)
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.plain(name, checks.tensor(name, x))
        _check_layout(name, x)
    q, k, v = inputs.under_autocast(q, k, v)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    checks.alike(q, {"k": k, "v": v})
    _check_match(q, k, v)
    checked = []
    for name, given, owner, of in (
        ("q_variable_block_sizes", sizes, "q", q),
        ("variable_block_sizes", kv_sizes, "k", k),
    ):
        if of.shape[1] % volume:
            raise ValueError(
                f"{owner} must have a multiple of {volume} slots, those of a tile, in its "
                f"sequence, but it has {of.shape[1]}, as it is (B, heads, S, head_dim) = "
                f"{tuple(of.transpose(1, 2).shape)}"
            )
        tiles = of.shape[1] // volume
        if given is None:
            checked.append(torch.full((tiles,), volume, dtype=torch.int32, device=q.device))
        else:
            checked.append(_checked_sizes(name, given, q.device, owner, tiles, volume, validate))
    further = {} if gate is None else {"compress_attn_weight": gate}
    return Inputs(
        q=q,
        k=k,
        v=v,
        sizes=checked[0],
        kv_sizes=checked[1],
        parts=volume // SLOTS,
        scale=checks.scale(None, q.shape[-1]),
        backend=inputs.chosen(backend, q, k, v, further),
    )


def volume_of(block_size: object) -> int:
    """Slots of a tile: their number, its sides (t, h, w), or one side of a cube."""
    if isinstance(block_size, (tuple, list)):
        found = math.prod(checks.extent("block_size", block_size))
    else:
        found = checks.integer("block_size", block_size, at_least=1)
        found = found if found in VOLUMES else found**3
    if found not in VOLUMES:  # only then is it written: PyTorch 2.11 cannot trace such a sentence
        raise ValueError(
            f"block_size must be 64, 128 or 256 slots, or three sides (t, h, w) of as many, but it "
            f"is {block_size!r:.60}"
        )
    return found


def volume_by(name: str, tiles: int, owner: str, slots: int) -> int:
    """Slots of a tile where a sequence of so many ``slots`` has so many ``tiles``."""
    for volume in VOLUMES:
        if tiles * volume == slots:
            return volume
    raise ValueError(
        f"{name} speaks of {tiles} tiles of {owner}, which must have 64, 128 or 256 slots each, "
        f"but {owner} has {slots} slots in its sequence"
    )


def check_integers(name: str, x: object, device: torch.device) -> Tensor:
    """A tensor of whole numbers on the device of q."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of integers, but it is a {type(x).__name__}")
    if x.dtype.is_floating_point or x.dtype.is_complex or x.dtype is torch.bool:
        raise TypeError(f"{name} must be a tensor of integers, but it is {x.dtype}")
    check_device(name, x, device)
    return x


def check_device(name: str, x: Tensor, device: torch.device) -> None:
    """On the device of q."""
    if x.device != device:
        raise ValueError(
            f"{name} must share the device of q, but it is on {x.device} and q is on {device}"
        )


def check_numbers(right: Tensor, x: Tensor, validate: bool, sentence: str) -> None:
    """All of ``right``: read on the host where that waits for nothing or is asked for.

    Elsewhere the device asks, without being waited for, and a wrong number is to stop it by an
    assertion (untested on a GPU), which names no argument there; ``validate=True`` does.

    Args:
        right: bool, which numbers of ``x`` are allowed.
        x: the numbers.
        validate: whether to wait for a GPU.
        sentence: what is allowed; what was found is added where it is known.
    """
    if torch.compiler.is_compiling() or not (validate or is_readable(x)):
        torch._assert_async(right.all(), sentence)
    elif not bool(right.all()):
        found = x.expand(right.shape)[~right][0].item()
        raise ValueError(f"{sentence}, but it holds {found}")


def is_readable(x: Tensor) -> bool:
    """Whether reading numbers waits for nothing."""
    return x.device.type == "cpu"


def check_sizes(name: str, sizes: Tensor, volume: int, validate: bool) -> None:
    """Numbers of real tokens, from 0 to the slots of a tile."""
    allowed = f"{name} must hold numbers of tokens from 0 to {volume}"
    check_numbers((sizes >= 0) & (sizes <= volume), sizes, validate, allowed)


def check_lists(lists: Tensor, counts: Tensor, columns: int, validate: bool) -> Tensor:
    """Lists of key tiles and how many of each are read; which those are, as bools like lists."""
    width = lists.shape[3]
    check_numbers(
        (counts >= 0) & (counts <= width),
        counts,
        validate,
        f"q2k_num must hold counts from 0 to {width}, the width of q2k_idx",
    )
    listed = torch.arange(width, device=lists.device) < counts.unsqueeze(-1)
    check_numbers(
        ~listed | (lists >= 0) & (lists < columns),
        lists,
        validate,
        f"q2k_idx must hold key tiles from 0 to {columns - 1} in the first q2k_num of a row",
    )
    return listed


def _check_layout(name: str, x: Tensor) -> None:
    """(B, heads, S, head_dim), and not empty."""
    if x.ndim != 4:
        raise ValueError(
            f"{name} must be (B, heads, S, head_dim), but its shape is {tuple(x.shape)}"
        )
    if 0 in x.shape:
        raise ValueError(f"{name} must not be empty, but its shape is {tuple(x.shape)}")
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(
            f"{name} must have a contiguous last dimension (head_dim), but its strides are "
            f"{tuple(x.stride())}"
        )


def _check_match(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Keys fit queries and values fit keys, each (B, S, heads, head_dim)."""
    if v.shape != k.shape:
        raise ValueError(
            f"v must have the shape of k, but v is {_as_given(v)} and k is {_as_given(k)}"
        )
    if k.shape[0] != q.shape[0] or k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"k must have the batch and head_dim of q, but k is {_as_given(k)} and q is "
            f"{_as_given(q)}"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"k must have a number of heads that divides the heads of q, but k has {k.shape[2]} "
            f"and q has {q.shape[2]}"
        )


def _as_given(x: Tensor) -> tuple[int, ...]:
    return tuple(x.transpose(1, 2).shape)


def _checked_sizes(
    name: str,
    x: object,
    device: torch.device,
    owner: str,
    tiles: int,
    volume: int,
    validate: bool,
) -> Tensor:
    """(tiles,) int32, numbers from 0 to ``volume``."""
    sizes = check_integers(name, x, device)
    if tuple(sizes.shape) != (tiles,):
        batches = ": all videos of a batch share them" if sizes.ndim == 2 else ""
        raise ValueError(
            f"{name} must have one number for each of the {tiles} tiles of {owner}, but its shape "
            f"is {tuple(sizes.shape)}{batches}"
        )
    check_sizes(name, sizes, volume, validate)
    return sizes.to(torch.int32)
