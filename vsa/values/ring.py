# SPDX-License-Identifier: Apache-2.0
"""Where a cache of chunks stands, as far as calls depend on it without reading its numbers."""

from __future__ import annotations

from typing import NamedTuple


class Ring(NamedTuple):
    """The slots of a ``vsa.KVCache``.

    Attributes:
        capacity: slots.
        sinks: first slots, which no other chunk takes.
        prefix: text tokens before the first slot.
        past: chunks that are held besides the current one.
    """

    capacity: int
    sinks: int
    prefix: int
    past: int

    @property
    def is_full(self) -> bool:
        """Whether all slots are in use, the current chunk's included: a number on the device."""
        return self.past + 1 == self.capacity

    @property
    def turns(self) -> bool:
        """Whether slots may be in another order than time."""
        return self.is_full and self.capacity - self.sinks > 1
