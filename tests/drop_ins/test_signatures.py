# SPDX-License-Identifier: Apache-2.0
"""Names, order and keywords of the drop-ins are those of FastVideo's kernels, in both forms."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import torch
from drop_ins.padded import Call, numbers
from torch import Tensor

import vsa

REQUIRED = inspect.Parameter.empty
TOKENS = {"q": REQUIRED, "k": REQUIRED, "v": REQUIRED}
THEIRS: dict[str, dict[str, Any]] = {
    "video_sparse_attn": TOKENS
    | {
        "variable_block_sizes": REQUIRED,
        "q_variable_block_sizes": REQUIRED,
        "topk": REQUIRED,
        "block_size": 64,
        "compress_attn_weight": None,
    },
    "block_sparse_attn": TOKENS | {"block_map": REQUIRED, "variable_block_sizes": REQUIRED},
    "block_sparse_attn_from_indices": TOKENS
    | {"q2k_idx": REQUIRED, "q2k_num": REQUIRED, "variable_block_sizes": REQUIRED},
}
"""Parameters and defaults in fastvideo-kernel 0.3.5, in order."""


def parameters_of(source: Path) -> dict[str, dict[str, Any]]:
    """Parameters and defaults of the public functions that a file defines."""
    found = {}
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            names = [each.arg for each in node.args.args]
            defaults = [ast.literal_eval(each) for each in node.args.defaults]
            padding = [REQUIRED] * (len(names) - len(defaults))
            found[node.name] = dict(zip(names, [*padding, *defaults], strict=True))
    return found


@pytest.mark.parametrize("name", THEIRS)
def test_ours_begin_with_theirs(name: str) -> None:
    ours = inspect.signature(getattr(vsa, name)).parameters
    assert list(ours)[: len(THEIRS[name])] == list(THEIRS[name])
    for each, default in THEIRS[name].items():
        assert ours[each].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        # What the older form leaves out has a default here, and is asked for where it is needed.
        assert default is REQUIRED or ours[each].default == default
    more = list(ours.values())[len(THEIRS[name]) :]
    assert {each.name for each in more} == {"validate", "backend"}
    assert all(each.kind is inspect.Parameter.KEYWORD_ONLY for each in more)


def test_against_their_own_source() -> None:
    """Where fastvideo-kernel is installed; a change of theirs is a failure that names it."""
    try:
        theirs = distribution("fastvideo-kernel")
    except PackageNotFoundError:
        pytest.skip("fastvideo-kernel is not installed here, so the names above are held alone")
    found: dict[str, dict[str, Any]] = {}
    for file in ("ops", "block_sparse_attn"):
        found |= parameters_of(Path(str(theirs.locate_file(f"fastvideo_kernel/{file}.py"))))
    assert {name: list(found[name].items()) for name in THEIRS} == {
        name: list(wanted.items()) for name, wanted in THEIRS.items()
    }


def test_a_change_of_theirs_would_be_seen(tmp_path: Path) -> None:
    source = tmp_path / "ops.py"
    source.write_text("def block_sparse_attn(q, k, v, sizes, scale=None): ...\n")
    found = parameters_of(source)["block_sparse_attn"]
    assert list(found.items()) == [*TOKENS.items(), ("sizes", REQUIRED), ("scale", None)]


CALL = Call((64, 17, 40), topk=2, dtype=torch.float64)
SIZES = numbers(CALL.sizes)
# The distribution vsa 0.0.4: (q, k, v, variable_block_sizes, topk, block_size,
# compress_attn_weight=None).
FORMS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "FastVideo, by position": lambda q, k, v, w: vsa.video_sparse_attn(
        q, k, v, SIZES, SIZES, 2, (4, 4, 4), w
    ),
    "FastVideo, by keyword": lambda q, k, v, w: vsa.video_sparse_attn(
        q,
        k,
        v,
        variable_block_sizes=SIZES,
        q_variable_block_sizes=SIZES,
        topk=2,
        block_size=(4, 4, 4),
        compress_attn_weight=w,
    ),
    "SGLang, without the queries' sizes": lambda q, k, v, w: vsa.video_sparse_attn(
        q,
        k,
        v,
        variable_block_sizes=SIZES,
        topk=2,
        block_size=(4, 4, 4),
        compress_attn_weight=w,
    ),
    "vsa 0.0.4, by position": lambda q, k, v, w: vsa.video_sparse_attn(
        q, k, v, SIZES, 2, (4, 4, 4), w
    ),
    "vsa 0.0.4, weight by keyword": lambda q, k, v, w: vsa.video_sparse_attn(
        q, k, v, SIZES, 2, (4, 4, 4), compress_attn_weight=w
    ),
    "vsa 0.0.4, the rest by keyword": lambda q, k, v, w: vsa.video_sparse_attn(
        q, k, v, SIZES, 2, block_size=(4, 4, 4), compress_attn_weight=w
    ),
    "slots of a tile": lambda q, k, v, w: vsa.video_sparse_attn(q, k, v, SIZES, SIZES, 2, 64, w),
    "side of a cube": lambda q, k, v, w: vsa.video_sparse_attn(q, k, v, SIZES, SIZES, 2, 4, w),
}


def tokens() -> list[Tensor]:
    tensors = CALL.tensors()
    return [tensors[name] for name in ("q", "k", "v", "weight")]


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_are_one_call(form: str) -> None:
    expected = vsa.video_sparse_attn(*tokens()[:3], SIZES, SIZES, 2, 64, tokens()[3])
    assert torch.equal(FORMS[form](*tokens()), expected)


def test_the_older_form_without_a_weight() -> None:
    q, k, v, weight = tokens()
    alone = vsa.video_sparse_attn(q, k, v, SIZES, 2, (4, 4, 4))
    assert torch.equal(alone, vsa.video_sparse_attn(q, k, v, SIZES, SIZES, 2, 64, None))
    ones = vsa.video_sparse_attn(q, k, v, SIZES, 2, (4, 4, 4), torch.ones_like(weight))
    torch.testing.assert_close(alone, ones)


def test_without_the_queries_sizes_all_rows_of_other_queries_are_real() -> None:
    q, k, v, _ = tokens()
    q = torch.randn(1, 2, 64, 16, dtype=torch.float64)
    whole = vsa.video_sparse_attn(q, k, v, SIZES, numbers([64]), 2, 64)
    assert torch.equal(vsa.video_sparse_attn(q, k, v, variable_block_sizes=SIZES, topk=2), whole)
