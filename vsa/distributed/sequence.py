# SPDX-License-Identifier: Apache-2.0
"""Layers that take this rank's part of the sequence."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from vsa.distributed.shards import ranks_of
from vsa.distributed.ulysses import ulysses_attention
from vsa.nn import VideoSparseAttention


def shard_sequence(module: nn.Module, group: Any, lengths: Sequence[int] | None = None) -> None:
    """Let every ``vsa.nn.VideoSparseAttention`` of a module take this rank's part of the sequence.

    They are then called with x (B, S_r, dim) and the grid of the whole sequence, and attend it by
    ``ulysses_attention``. All else in such a layer is done for each token. Gradients of weights are
    parts that add up over the group; FSDP2 over its ranks takes their mean.

    Args:
        module: a layer, or what has some.
        group: as in ``ulysses_attention``; its ranks must divide the heads.
        lengths: tokens of every rank, as there.

    Raises:
        TypeError, ValueError, RuntimeError: a group that is none, a module without such a layer, a
            layer with a forward of its own, or heads that the ranks do not divide.
    """
    columns = ranks_of(group).columns
    layers = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, VideoSparseAttention)
    }
    if not layers:
        raise ValueError(
            "module must have a vsa.nn.VideoSparseAttention in it, but "
            f"{type(module).__name__} has none"
        )
    for name, layer in layers.items():
        if type(layer).forward is not VideoSparseAttention.forward:
            raise TypeError(
                f"module must have layers that leave attention to VideoSparseAttention, but "
                f"{name or 'it'} is a {type(layer).__name__} with a forward of its own"
            )
        if layer.heads % columns:
            raise ValueError(
                f"group has {columns} ranks to share out heads, which must divide the "
                f"{layer.heads} heads of {name or 'the layer'}"
            )
    for layer in layers.values():
        layer.attend = partial(ulysses_attention, group=group, lengths=lengths)
