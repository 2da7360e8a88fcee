# SPDX-License-Identifier: Apache-2.0
"""Placeholders lead where the same steps lead with tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vsa.backends.kernels.placeholder import Placeholder, Workspace, part_of
from vsa.backends.kernels.tensors import as_matrices, beginning

SLICES = st.builds(slice, st.integers(0, 4), st.none() | st.integers(5, 9))
STEPS = st.lists(st.just("mT") | st.tuples(SLICES, SLICES) | st.tuples(SLICES), max_size=4)


def after(x: Any, steps: list[Any]) -> Any:
    for step in steps:
        x = x.mT if step == "mT" else x[step]
    return x


@given(steps=STEPS)
def test_parts_and_transposes(steps: list[Any]) -> None:
    tensor = torch.zeros(5, 6, 7)
    stands = Placeholder(3, (5, 6, 7), tensor.stride(), tensor.dtype, offset=512)
    found, true = after(stands, steps), after(tensor, steps)
    assert found.shape == true.shape and found.stride() == true.stride()
    if true.numel():
        assert found.data_ptr() - stands.data_ptr() == true.data_ptr() - tensor.data_ptr()


@pytest.mark.parametrize("shape", [(2, 6, 5, 4), (2, 2, 3, 4)])
def test_matrices_and_beginnings(shape: tuple[int, ...]) -> None:
    work = Workspace(0)
    work.part((3,), torch.uint8)
    part = work.part(shape, torch.float32)
    memory = torch.zeros(work.nbytes, dtype=torch.uint8)
    tensor = part_of(memory, part)
    for make in (lambda x: as_matrices(x, 4), lambda x: beginning(x, 3, 2)):
        found, true = make(part), make(tensor)
        assert found.shape == true.shape and found.stride() == true.stride()
        offset = true.data_ptr() - memory.data_ptr()
        assert found.data_ptr() - Workspace(0).part((1,), torch.uint8).data_ptr() == offset
