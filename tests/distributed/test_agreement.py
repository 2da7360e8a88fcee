# SPDX-License-Identifier: Apache-2.0
"""What ranks ask each other about their calls, by one process that plays two ranks in turn."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from vsa.distributed.agreement import Agreement


class SlowReader:
    """A store to whose rank something happens elsewhere before each of its reads."""

    def __init__(self, store: HashStore, meanwhile: Callable[[], None]) -> None:
        self.store, self.meanwhile = store, meanwhile
        self.set, self.get, self.timeout = store.set, store.get, store.timeout
        self.delete_key = store.delete_key

    def wait(self, keys: list[str], timeout: object) -> None:
        self.meanwhile()
        self.store.wait(keys, timeout)


def test_a_slow_rank_still_finds_what_a_rank_answered_that_has_refused_since() -> None:
    store = HashStore()
    store.set_timeout(timedelta(seconds=1))  # nobody else writes, so what is missing stays missing
    quick = Agreement(store, 1, 2)

    def run_ahead() -> None:
        quick.agree({"topk": 2})  # rank 0 has answered, so this reads it and goes on
        quick.refuse(ValueError("q has 104 tokens"))
        quick.refuse(ValueError("q has 103 tokens"))

    slow = Agreement(SlowReader(store, run_ahead), 0, 2)
    slow.agree({"topk": 2})
    slow.store.meanwhile = lambda: None
    for tokens in (104, 103):
        with pytest.raises(RuntimeError, match=f"rank 1 has refused .* q has {tokens} tokens"):
            slow.agree({"topk": tokens})


def test_answers_leave_the_store_once_all_ranks_have_read_them() -> None:
    store = HashStore()
    one = Agreement(store, 1, 2)
    zero = Agreement(SlowReader(store, lambda: one.agree(asked)), 0, 2)
    for topk in range(20):
        asked = {"topk": topk}
        zero.agree(asked)
    assert store.num_keys() <= 4  # one question's answers, and the deleted one's of the other rank
    asked = {"topk": 0}
    zero.store.meanwhile = lambda: pytest.fail("what was agreed on is not asked again")
    zero.agree(asked)
