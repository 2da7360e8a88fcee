# SPDX-License-Identifier: Apache-2.0
"""What processes of test_distributed.py do when one of them errs, is elsewhere, or ends."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from distributed.distributed_jobs import GRID

from vsa.distributed import agreement, ulysses_attention

SOON = timedelta(seconds=1)
MOST_SECONDS = 900.0
"""A busy machine is slow; a fault that nobody notices would take the group's half an hour."""


def call(channels=8, heads=4, tokens=105, group=None, topk=2):
    x = torch.zeros(1, tokens, heads, channels)
    return ulysses_attention(x, x, x, topk, grid=GRID, group=group)


def two(rank):
    begin = time.monotonic()
    with pytest.raises(ValueError, match=r"q must be the same on all ranks of the group, but it"):
        call(heads=4 * (rank + 1))
    with pytest.raises(ValueError, match=f"topk must be the same .* is {rank + 1} on rank {rank}"):
        call(topk=rank + 1)

    words = "q has 104 tokens on rank 1 of the group"
    with pytest.raises(RuntimeError if rank == 0 else ValueError, match=words) as caught:
        call(tokens=105 - rank)
    if rank == 0:
        assert str(caught.value).startswith("group cannot go on, as its rank 1 has refused its")
    assert call().shape == (1, 105, 4, 8)  # and all go on

    store = agreement._agreement_of(dist.group.WORLD).store
    group = dist.new_group([0, 1])
    call(group=group)
    if rank == 0:  # the other one is alive, and elsewhere
        dist.distributed_c10d._set_pg_timeout(SOON, group)
        with pytest.raises(RuntimeError, match="group could not finish an all-to-all of its 2"):
            call(group=group)
        store.set_timeout(SOON)
        with pytest.raises(RuntimeError, match="group waited 1 s on its rank 0 for rank 1, which"):
            call(channels=16)
        store.set("done", "")
        store.set_timeout(timedelta(minutes=5))
        store.wait(["ends"])
        with pytest.raises(RuntimeError, match=r"all-to-all .* another rank has ended"):
            call()
        assert time.monotonic() - begin < MOST_SECONDS
    else:
        store.wait(["done"])
        store.set("ends", "")
        os._exit(0)
