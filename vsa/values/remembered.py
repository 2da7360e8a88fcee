# SPDX-License-Identifier: Apache-2.0
"""A bounded memory of things made once, shared by threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Remembered(Generic[T]):
    """Values by key; past the bound the oldest is forgotten. Looking up takes no lock.

    Args:
        most: values that are held.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.values: dict[Hashable, T] = {}
        self._renew_lock()
        # A thread that held the lock does not exist in a forked process.
        os.register_at_fork(after_in_child=self._renew_lock)

    def _renew_lock(self) -> None:
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> T | None:
        """The value of a key, None for one that is new."""
        return self.values.get(key)

    def put(self, key: Hashable, value: T) -> None:
        """Remember a value."""
        with self._lock:
            while len(self.values) >= self.most:
                del self.values[next(iter(self.values))]
            self.values[key] = value
