# SPDX-License-Identifier: Apache-2.0
"""Attributes of a host that are put in the place of others, and back."""

from __future__ import annotations

import threading
from typing import Any

MISSING = object()


class Patches:
    """What was set on whose attributes, so that ``undo`` leaves no trace.

    Args:
        host: whose attributes they are, for error sentences.
    """

    def __init__(self, host: str) -> None:
        self.host = host
        self._old: list[tuple[object, str, object, object]] = []
        self.lock = threading.RLock()

    def __bool__(self) -> bool:
        return bool(self._old)

    def put(self, owner: object, name: str, value: object) -> None:
        """Set an attribute, and keep what was there; one that is ours already changes alone."""
        old = self.old(owner, name)
        setattr(owner, name, value)
        others = [each for each in self._old if each[0] is not owner or each[1] != name]
        self._old = [*others, (owner, name, old, vars(owner)[name])]

    def old(self, owner: object, name: str) -> Any:
        """What an attribute was before it was set here; MISSING where there was none."""
        known = [old for whose, what, old, _ in self._old if whose is owner and what == name]
        return known[0] if known else vars(owner).get(name, MISSING)

    def undo(self) -> None:
        """Put everything back, the latest first.

        Raises:
            RuntimeError: someone else has set one of them since; nothing is changed then.
        """
        with self.lock:
            for owner, name, _, ours in self._old:
                if vars(owner).get(name, MISSING) is not ours:
                    raise RuntimeError(
                        f"{self.host} cannot be put back: {name} of {owner!r} was replaced again "
                        "after install(); undo that first"
                    )
            while self._old:
                owner, name, old, _ = self._old.pop()
                if old is MISSING:
                    delattr(owner, name)
                else:
                    setattr(owner, name, old)
