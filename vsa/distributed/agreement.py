# SPDX-License-Identifier: Apache-2.0
"""Ranks find out whether they ask for the same, before the first exchange of a kind.

What ranks do not agree on would be a hang: an all-to-all waits for as many numbers as its own rank
expects. So the first time that a rank asks for something, it leaves a description in the store in
which the process group has met, and reads those of the others. No device takes part. Calls of a
kind that was agreed on before go without.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

MOST = 4096
"""Descriptions that a group remembers; all ranks forget the same ones, as they came alike."""
REFUSED = "refused"
"""What a rank that has raised an error leaves in place of a description."""


@dataclass(eq=False)
class _History:
    """What one group has agreed on, and how often it was asked."""

    agreed: dict[str, None] = field(default_factory=dict)
    asked: int = 0


_histories: weakref.WeakKeyDictionary[Any, _History] = weakref.WeakKeyDictionary()


def agree(group: Any, asked: Mapping[str, object]) -> None:
    """Return once all ranks of a group ask for the same; every rank calls it alike.

    Args:
        group: a process group.
        asked: by argument, what has to be the same on all ranks.

    Raises:
        ValueError: naming the first argument in which a rank differs.
        RuntimeError: a rank that has refused its arguments, or has not come within the timeout.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    text = json.dumps({name: str(value) for name, value in asked.items()})
    history = _histories.setdefault(group, _History())
    if ranks == 1 or text in history.agreed:
        return
    store, asked_before = _store_of(group), history.asked
    _leave(store, history, rank, text)
    for other in range(ranks):
        if other == rank:
            continue
        _compare(rank, text, other, _read(store, _key(asked_before, other), rank, other))
    if len(history.agreed) >= MOST:
        del history.agreed[next(iter(history.agreed))]
    history.agreed[text] = None


def refuse(group: Any, error: Exception) -> None:
    """Tell the other ranks, if they come to agree, that this one has raised an error instead."""
    if dist.get_world_size(group) > 1:
        history = _histories.setdefault(group, _History())
        text = json.dumps({REFUSED: str(error)})
        _leave(_store_of(group), history, dist.get_rank(group), text)


def can_agree() -> bool:
    """Whether descriptions can be compared now: a graph that is traced has none yet."""
    return not torch.compiler.is_compiling()


def _leave(store: Any, history: _History, rank: int, text: str) -> None:
    store.set(_key(history.asked, rank), text)
    if history.asked > 1:
        # Whoever leaves the last but this one has been read by all: each rank reads all of one
        # question before it leaves its answer to the next.
        store.delete_key(_key(history.asked - 2, rank))
    history.asked += 1


def _key(number: int, rank: int) -> str:
    return f"vsa/ulysses_attention/{number}/{rank}"


def _read(store: Any, key: str, rank: int, other: int) -> str:
    timeout: timedelta = store.timeout
    try:
        store.wait([key], timeout)
        found = store.get(key)
    except RuntimeError as error:
        raise RuntimeError(
            f"group waited {timeout.total_seconds():g} s on its rank {rank} for rank {other}, "
            "which has ended, or is at another call of ulysses_attention"
        ) from error
    return str(found.decode())


def _compare(rank: int, text: str, other: int, theirs: str) -> None:
    own, found = json.loads(text), json.loads(theirs)
    if REFUSED in found:
        raise RuntimeError(
            f"group cannot go on, as its rank {other} has refused its arguments: {found[REFUSED]}"
        )
    for name in own:
        if own[name] != found.get(name):
            raise ValueError(
                f"{name} must be the same on all ranks of the group, but it is {own[name]} on "
                f"rank {rank} and {found.get(name)} on rank {other}"
            )


def _store_of(group: Any) -> Any:
    return distributed_c10d._get_process_group_store(group)
