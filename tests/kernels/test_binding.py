# SPDX-License-Identifier: Apache-2.0
"""vsa._C: every field of a call is checked by name, and every call runs by the same two methods."""

from __future__ import annotations

import re

import pytest
import torch

_C = pytest.importorskip("vsa._C", reason="vsa was built without its compiled part")

NO_GATE = (0, 0, 0, 0, 0, 0)
VIEW = (16, 1, 1, 1)
CALLS = {name: x for name, x in vars(_C).items() if hasattr(x, "FIELDS")}


def combine(**changed):
    fields = {
        "fine": VIEW,
        "out": VIEW,
        "gates": _C.Gates(fine=NO_GATE, coarse=NO_GATE, coarse_rows=0),
        "grid": [4, 4, 4, 4, 4, 4, 0, 0],
        "batch": 1,
        "heads": 1,
        "head_dim": 64,
        "dtype": "bfloat16",
    }
    return _C.Combine(**fields | changed)


@pytest.mark.parametrize(
    ("changed", "error", "sentence"),
    [
        ({"batch": 0}, ValueError, "Combine: batch must be positive, but it is 0"),
        ({"batch": 1.5}, TypeError, "Combine: batch must be int, but it is of type float"),
        ({"fine": 16}, TypeError, r"Combine: fine must be tuple\[int, int, int, int\] .* type int"),
        ({"fine": (0, 1, 1, 1)}, ValueError, "Combine: fine must not be a null address"),
        ({"gates": None}, TypeError, "Combine: gates must be Gates, but it is of type NoneType"),
        ({"grid": [4] * 7}, TypeError, "Combine: grid must be .*, but it is of type list"),
        ({"grid": [0] * 8}, ValueError, "Combine: grid: sizes of video and tile must be positive"),
        ({"head_dim": 96}, ValueError, r"Combine: head_dim must be one of \(64, 128\), .* 96"),
        ({"dtype": "float32"}, ValueError, "Combine: dtype must be one of .* it is 'float32'"),
        ({"dtype": "int8"}, ValueError, "Combine: dtype must be bfloat16, float16 or float32"),
        ({"scale": 1.0}, TypeError, "Combine has no field scale, its fields are fine, out, gates"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_field_is_one_sentence_with_its_name(changed, error, sentence):
    combine()
    with pytest.raises(error, match=f"^{sentence}[^\n]*$"):
        combine(**changed)


@pytest.mark.parametrize("name", CALLS)
def test_a_missing_field_is_named(name):
    first = next(iter(CALLS[name].FIELDS))
    with pytest.raises(TypeError, match=f"^{name}: {first} is missing$"):
        CALLS[name]()


def test_every_call_has_the_same_two_methods():
    runs = {name: x for name, x in CALLS.items() if hasattr(x, "launch")}
    assert CALLS.keys() - runs == {"FineProblem", "Gates", "MeanTensor", "Product"}
    for call in runs.values():
        assert re.match(r"launch\(self: .*, device: .*, stream: .*\) -> None", call.launch.__doc__)
        assert re.match(r"emulate\(self: .*, blocks: .*, seed: .*\) -> None", call.emulate.__doc__)


def test_a_launch_without_cuda_says_what_is_missing():
    if _C.build_info()["cuda"]:
        pytest.skip("this build has a CUDA part")
    with pytest.raises(RuntimeError, match="has no CUDA part"):
        combine().launch(0, 0)


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
