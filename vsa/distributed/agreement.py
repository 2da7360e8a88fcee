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
class Agreement:
    """What one rank knows of the questions that all ranks of a group answer in the same order.

    An answer stays in the store until every other rank has answered a later question, since a rank
    reads no answer to an earlier one after that. A rank that refuses answers without reading, so
    answering alone does not show that it has read: only other ranks' later answers show it.
    """

    store: Any
    rank: int
    ranks: int
    agreed: dict[str, None] = field(default_factory=dict)
    asked: int = 0
    oldest: int = 0
    """The first question to which this rank's answer is still in the store."""

    def agree(self, asked: Mapping[str, object], again: bool = False) -> None:
        """Answer the next question and read what the others answered, if new or ``again``."""
        text = json.dumps({name: str(value) for name, value in asked.items()})
        if self.ranks == 1 or (text in self.agreed and not again):
            return
        number = self._answer(text)
        for other in range(self.ranks):
            if other != self.rank:
                theirs = _read(self.store, _key(number, other), self.rank, other)
                _compare(self.rank, text, other, theirs)
        while self.oldest < number:
            self.store.delete_key(_key(self.oldest, self.rank))
            self.oldest += 1
        if again:
            return
        if len(self.agreed) >= MOST:
            del self.agreed[next(iter(self.agreed))]
        self.agreed[text] = None

    def refuse(self, error: Exception) -> None:
        """Answer the next question by the error that this rank has raised instead of asking it."""
        if self.ranks > 1:
            self._answer(json.dumps({REFUSED: str(error)}))

    def _answer(self, text: str) -> int:
        self.store.set(_key(self.asked, self.rank), text)
        self.asked += 1
        return self.asked - 1


_agreements: weakref.WeakKeyDictionary[Any, Agreement] = weakref.WeakKeyDictionary()


def agree(group: Any, asked: Mapping[str, object], again: bool = False) -> None:
    """Return once all ranks of a group ask for the same; every rank calls it alike.

    Args:
        group: a process group.
        asked: by argument, what has to be the same on all ranks.
        again: whether to ask what was agreed on before, which is not remembered then.

    Raises:
        ValueError: naming the first argument in which a rank differs.
        RuntimeError: a rank that has refused its arguments, or has not come within the timeout.
    """
    _agreement_of(group).agree(asked, again)


def refuse(group: Any, error: Exception) -> None:
    """Tell the other ranks, if they come to agree, that this one has raised an error instead."""
    _agreement_of(group).refuse(error)


def _agreement_of(group: Any) -> Agreement:
    if group not in _agreements:
        store = distributed_c10d._get_process_group_store(group)
        _agreements[group] = Agreement(store, dist.get_rank(group), dist.get_world_size(group))
    return _agreements[group]


def can_agree() -> bool:
    """Whether descriptions can be compared now: a graph that is traced has none yet."""
    return not torch.compiler.is_compiling()


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
