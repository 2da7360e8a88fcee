# SPDX-License-Identifier: Apache-2.0
"""vsa._C: every field of a call is checked by name, and every call runs by the same two methods."""

from __future__ import annotations

import re

import pytest
import torch

_C = pytest.importorskip("vsa._C", reason="vsa was built without its compiled part")

NO_GATE = (0, 0, 0, 0, 0, 0)
VIEW = (16, 1, 1, 1)
NOWHERE = (0, 1, 1, 1)
CALLS = {name: x for name, x in vars(_C).items() if hasattr(x, "FIELDS")}


def problem(**changed):
    fields = {
        "grid": [4, 4, 4, 4, 4, 4, 0, 0],
        "kv_grid": [4, 4, 4, 4, 4, 4, 0, 0],
        "batch": 1,
        "heads": 1,
        "kv_heads": 1,
        "head_dim": 64,
        "dtype": "bfloat16",
        "scale": 0.125,
        "bitmap": 16,
        "query_axes": 16,
        "query_text_rows": 0,
        "key_text_rows": 0,
        "sizes": 0,
        "kv_sizes": 0,
    }
    return _C.FineProblem(**fields | changed)


def forward(**changed):
    fields = dict.fromkeys(("q", "k", "v", "out", "fine"), (VIEW, VIEW, VIEW))
    fields |= {
        "problem": problem(),
        "gates": _C.Gates(fine=NO_GATE, coarse=NO_GATE, coarse_rows=0),
        "lse": 16,
        "tile_counter": 16,
        "order": 0,
        "long_ones": 0,
    }
    return _C.FineForward(**fields | changed)


@pytest.mark.parametrize(
    ("call", "changed", "error", "sentence"),
    [
        (problem, {"batch": 0}, ValueError, "batch must be positive, but it is 0"),
        (problem, {"batch": 1.5}, TypeError, "batch must be int, but it is of type float"),
        (problem, {"grid": [4] * 7}, TypeError, "grid must be .*, but it is of type list"),
        (problem, {"grid": [0] * 8}, ValueError, "grid: sizes of video and tile must be positive"),
        (problem, {"head_dim": 96}, ValueError, r"head_dim must be one of \(64, 128\), .* 96"),
        (problem, {"dtype": "float32"}, ValueError, "dtype must be one of .* it is 'float32'"),
        (problem, {"dtype": "int8"}, ValueError, "dtype must be bfloat16, float16 or float32"),
        (problem, {"fine": 1.0}, TypeError, "has no field fine, its fields are grid, kv_grid,"),
        (forward, {"q": 16}, TypeError, r"q must be tuple\[.*\] .* type int"),
        (forward, {"q": (NOWHERE,) * 3}, ValueError, "q must not be a null address"),
        (forward, {"gates": None}, TypeError, "gates must be Gates, but it is of type NoneType"),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_what_is_wrong_with_a_field_is_one_sentence_with_its_name(call, changed, error, sentence):
    owner = type(call()).__name__
    with pytest.raises(error, match=f"^{owner}:? {sentence}[^\n]*$"):
        call(**changed)


@pytest.mark.parametrize("name", CALLS)
def test_a_missing_field_is_named(name):
    first = next(iter(CALLS[name].FIELDS))
    with pytest.raises(TypeError, match=f"^{name}: {first} is missing$"):
        CALLS[name]()


def test_every_call_has_the_same_two_methods():
    runs = {name: x for name, x in CALLS.items() if hasattr(x, "launch")}
    parts = {"FineProblem", "Gates", "MeanTensor", "Product", "RunTensor", "TailKeys"}
    parts |= {"TextTensor", "MaskOfTiles"}
    assert CALLS.keys() - runs == parts
    for call in runs.values():
        assert re.match(r"launch\(self: .*, device: .*, stream: .*\) -> None", call.launch.__doc__)
        assert re.match(r"emulate\(self: .*, blocks: .*, seed: .*\) -> None", call.emulate.__doc__)


def test_a_launch_without_cuda_says_what_is_missing():
    if _C.build_info()["cuda"]:
        pytest.skip("this build has a CUDA part")
    with pytest.raises(RuntimeError, match="has no CUDA part"):
        forward().launch(0, 0)


def test_a_program_names_addresses_that_are_missing():
    bitmap = torch.zeros(1, 1, 4, 1, dtype=torch.int32)
    axes = torch.full((1, 1), -7, dtype=torch.int32)
    slot = 1 << 48
    step = _C.AxisChoice(
        bitmap=slot,
        axes=2 * slot,
        batch=1,
        heads=1,
        groups=1,
        words=1,
        tiles=(1, 2, 2),
        counters=0,
        count=0,
    ).step()
    program = _C.Program([step])
    for addresses in ([], [bitmap.data_ptr()]):
        wanted = f"addresses: {len(addresses)} are given, but a call uses slot {len(addresses) + 1}"
        with pytest.raises(ValueError, match=f"^{wanted}$"):
            program.emulate(addresses, 1, 0)
        assert axes.item() == -7
    program.emulate([bitmap.data_ptr(), axes.data_ptr()], 1, 0)
    assert axes.item() in (_C.ALONG_W, _C.ALONG_T)


@pytest.mark.parametrize("addresses", [[-1], ["a"], None, [2**64]])
def test_addresses_of_a_program_are_whole_numbers(addresses):
    with pytest.raises(TypeError, match=r"emulate\(\): incompatible function arguments"):
        _C.Program([]).emulate(addresses, 1, 0)
    _C.Program([]).emulate([], 1, 0)
