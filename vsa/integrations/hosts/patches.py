# SPDX-License-Identifier: Apache-2.0
"""Attributes of a host that are put in the place of others, and back."""

from __future__ import annotations

import threading

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
        """Set an attribute, and keep what was there."""
        old = vars(owner).get(name, MISSING)
        setattr(owner, name, value)
        self._old.append((owner, name, old, vars(owner)[name]))

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
