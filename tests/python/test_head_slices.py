# SPDX-License-Identifier: Apache-2.0
"""How many heads are in eight bits at a time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsa.backends.kernels.head_slices import sizes


def rounds(found: tuple[int, ...], work: int, blocks: int) -> int:
    """In which every block does a work tile, of all launches."""
    return sum(-(-heads * work // blocks) for heads in found)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 500), st.integers(1, 140))
def test_all_heads_are_taken_and_never_too_many(heads, most, work, blocks) -> None:
    found = sizes(heads, most, work, blocks)
    assert sum(found) == heads and min(found) >= 1 and max(found) <= most
    full, left = divmod(heads, most)
    as_many_as_fit = (most,) * full + ((left,) if left else ())
    assert rounds(found, work, blocks) <= rounds(as_many_as_fit, work, blocks)


@pytest.mark.parametrize(
    ("heads", "most", "work", "expected"),
    [
        (12, 4, 208, (3, 3, 3, 3)),  # Wan 1.3B at 480p: 20 rounds; 4, 4, 4 would take 21
        (40, 14, 480, (14, 14, 12)),  # Wan 14B at 720p: 146 either way
        (32, 10, 36, (10, 10, 10, 2)),  # LTX
        (12, 12, 208, (12,)),  # all at a time, if they may be
        (5, 1, 3, (1, 1, 1, 1, 1)),
    ],
)
def test_slices_of_models_on_132_multiprocessors(heads, most, work, expected) -> None:
    assert sizes(heads, most, work, 132) == expected
