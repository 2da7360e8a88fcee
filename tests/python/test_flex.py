# SPDX-License-Identifier: Apache-2.0
"""flex: the block mask and the results, eager on a CPU; gradients where there is a GPU."""

from __future__ import annotations

import warnings

import pytest
import torch

import vsa
from vsa.backends import flex
from vsa.backends.tiles import slot_tokens, token_valid
from vsa.verify.parity import PROBLEMS, Problem, worst

pytestmark = pytest.mark.filterwarnings(
    "ignore:flex_attention called without torch.compile:UserWarning"
)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_flex_agrees_with_torch(problem: Problem) -> None:
    tensors = {name: x for name, x in problem.inputs().items() if not name.startswith("upstream")}
    options = {
        "topk": problem.topk,
        "grid": problem.query_grid,
        "kv_grid": None if problem.kv_grid is None else problem.key_grid,
        "scale": problem.scale,
        "text_valid": problem.valid(),
        "return_lse": True,
    }
    out, lse = vsa.attention(**tensors, **options, backend="flex")
    expected, expected_lse = vsa.attention(**tensors, **options, backend="torch")
    assert worst(out, expected) < 1e-12
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)


def test_block_mask_lists_whole_blocks_apart_from_clipped_ones() -> None:
    grid = vsa.Grid((4, 4, 6), prefix=2)
    chosen = torch.tensor([[[[True, True], [False, True]]]])
    token = slot_tokens(grid, 64, torch.device("cpu"))
    valid = torch.nn.functional.pad(token_valid(None, grid, token.device), (0, 1))[
        :, token.flatten()
    ]
    mask = flex.block_mask(chosen, valid, len(token), len(token))
    dense = mask.to_dense()
    assert dense.tolist() == [[[[1, 1, 1], [0, 1, 1], [1, 1, 1]]]]
    assert mask.full_kv_num_blocks.tolist() == [[[1, 0, 1]]]
    assert mask.kv_num_blocks.tolist() == [[[2, 2, 2]]]
    assert mask.full_kv_indices[0, 0, 0, 0] == 0


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="FlexAttention has gradients on a GPU only"
)
@pytest.mark.parametrize(
    "problem", [p for p in PROBLEMS if p.head_dim >= 16], ids=lambda problem: problem.name
)
def test_flex_compiled_agrees_with_torch_forward_and_backward(problem: Problem) -> None:
    tensors = {name: x.float().cuda() for name, x in problem.inputs().items()}
    upstream = tensors.pop("upstream")
    tensors.pop("upstream_lse")
    valid = problem.valid()
    options = {
        "topk": problem.topk,
        "grid": problem.query_grid,
        "kv_grid": None if problem.kv_grid is None else problem.key_grid,
        "scale": problem.scale,
        "text_valid": None if valid is None else valid.cuda(),
    }
    runs = []
    for backend in ("torch", "flex"):
        leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
        out = vsa.attention(**leaves, **options, backend=backend)
        runs.append([out, *torch.autograd.grad((out * upstream).sum(), list(leaves.values()))])
    for expected, found in zip(*runs, strict=True):
        assert worst(found, expected.double()) < 1e-3


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="only a GPU has more than one backend to choose from"
)
def test_auto_on_a_gpu_warns_once_about_a_slower_backend() -> None:
    from vsa import backends

    backends._warned.clear()
    q = torch.randn(1, 4, 4, 8, 2, 64, device="cuda")  # fp32, which the kernels do not take
    with pytest.warns(UserWarning, match="slower backend 'flex'"):
        vsa.attention(q, q, q, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vsa.attention(q, q, q, 1)
