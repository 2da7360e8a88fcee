# SPDX-License-Identifier: Apache-2.0
"""What ptxas makes of the kernels: gates that need nvcc and no GPU."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace

import pytest

import sass

TAIL_PRODUCTS = {"TailForward": (12, 20), "BackwardMeans": (20, 32), "BackwardQueries": (16, 28)}
"""HGMMA instructions of the tail's kernels per chunk of means or query tile, at 64 and 128."""


@pytest.fixture(scope="module")
def compiled(machine_code):
    cubins, said = machine_code(*sass.SOURCES)
    if (nvdisasm := sass.disassembler()) is None:
        pytest.skip("there is no nvdisasm on this machine")
    return list(sass.kernels(cubins, said, nvdisasm)), said


def test_no_loop_spills_and_no_product_is_serialised(compiled) -> None:
    found, said = compiled
    assert len(found) == 18
    assert all(kernel.local == 0 for kernel in found), found
    assert not re.search(r"C75\d\d", said), said


def test_kernels_of_means_selection_and_text_stay_in_registers(machine_code) -> None:
    _, said = machine_code("coarse_select.cu", "clean_text.cu")
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", said)
    assert len(memory) == 2 * 9 + 6 + 1 + 1 and set(memory) == {("0", "0")}
    assert max(map(int, re.findall(r"Used (\d+) registers", said))) <= 168


def test_kernels_under_a_mask_stay_in_registers(machine_code) -> None:
    _, said = machine_code("masked_coarse.cu")
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", said)
    # Products, selection by five lengths of runs and two of any mask with and without mass, means
    # of three types, the softmax of both masks.
    assert len(memory) == 2 + 2 * (5 + 2) + 6 + 2 and set(memory) == {("0", "0")}
    assert not re.search(r"C75\d\d", said), said


def test_kernels_of_chunks_stay_in_registers(machine_code) -> None:
    _, said = machine_code("chunks.cu")
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", said)
    # Means and text of two types by two widths, bitmaps.
    assert len(memory) == 2 * 2 * 2 + 1 and set(memory) == {("0", "0")}


MOST_IN_EIGHT_BITS = {("S8", 128): 194, ("S8", 64): 194, ("E4m3", 128): 147, ("E4m3", 64): 141}
"""Instructions of a warp per tile of the low-precision forward, by scores and head_dim."""
LOCAL_IN_EIGHT_BITS = {128: 0, 64: 4}
"""Accesses to local memory in its main loop, those of rare branches included."""


@pytest.fixture(scope="module")
def low_precision(machine_code):
    return machine_code("low_precision.cu")


def test_kernels_that_quantise_stay_in_registers(low_precision) -> None:
    _, said = low_precision
    found = re.findall(
        r"properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores.*\n.*Used (\d+)",
        said,
    )
    memory = [
        (stack, spills, registers)
        for name, stack, spills, registers in found
        if "warps_kernel" in name
    ]
    assert len(memory) == 4 + 8  # both passes, of both types, sizes and precisions
    assert all((stack, spills) == ("0", "0") for stack, spills, _ in memory)
    assert max(int(registers) for *_, registers in memory) <= 80  # six warps each


def test_softmax_in_eight_bits_runs_while_products_are_in_flight(low_precision) -> None:
    cubins, said = low_precision
    assert not re.search(r"C75\d\d", said), said
    if (nvdisasm := sass.disassembler()) is None:
        pytest.skip("there is no nvdisasm on this machine")
    text = subprocess.run([nvdisasm, "-c", cubins[0]], capture_output=True, text=True, check=True)
    parts = [part for part in re.split(r"\n\.text\.", text.stdout)[1:] if "QGMMA" in part]
    assert len(parts) == 2 * 2 * 2 * 2  # types, sizes, scores, with and without gates
    for part in parts:
        name = part.split(":")[0]
        head_dim = 128 if "Li128E" in name else 64
        scores = "S8" if re.search(r"Li\d+EN\w*2S8E", name) else "E4m3"
        code, labels = sass.parse(re.sub("[IQ]GMMA", "HGMMA", part))
        wide = f"HGMMA.64x{head_dim + 8}"

        def is_main(body: list[str], wide: str = wide) -> bool:
            both = any(wide in x for x in body) and any("HGMMA.64x64" in x for x in body)
            return both and sum("RELU" in x for x in body) >= 16

        found = (loop for loop in sass.loops(code, labels) if is_main(code[loop]))
        loop = sass.smallest(found)
        body = code[loop]
        assert sass.shortest_round(code, labels, loop) <= MOST_IN_EIGHT_BITS[scores, head_dim]
        local = sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in body)
        assert local <= LOCAL_IN_EIGHT_BITS[head_dim]
        one, none = (
            next(i for i, line in enumerate(body) if f"gsb0, 0x{left}" in line) for left in (1, 0)
        )
        codes = [i for i, line in enumerate(body) if re.search("(F2FP|HFMA2).*RELU", line)]
        assert len(codes) == 16 and all(one < i < none for i in codes)


def test_fp32_products_stay_in_registers_and_run_while_the_next_numbers_are_split(
    machine_code,
) -> None:
    cubins, said = machine_code("float_product.cu")
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", said)
    assert memory == [("0", "0")] * 2 and not re.search(r"C75\d\d", said), said
    assert max(map(int, re.findall(r"Used (\d+) registers", said))) <= 256  # two blocks at a time
    if (nvdisasm := sass.disassembler()) is None:
        pytest.skip("there is no nvdisasm on this machine")
    for part in sass.disassembled(cubins[0], nvdisasm):
        code, _ = sass.parse(part)
        products = [i for i, line in enumerate(code) if "HGMMA" in line]
        wait = next(i for i, line in enumerate(code) if "WARPGROUP.DEPBAR" in line)
        assert len(products) == 6 * 4 and products[-1] < wait
        between = code[products[-1] : wait]
        assert sum("STS" in line for line in between) == 3 * 16
        assert sum("LDG" in line for line in between) >= 2 * 16


def test_kernels_of_the_tail_stay_in_registers_and_overlap_as_those_of_the_fine_stage(
    machine_code,
) -> None:
    cubins, said = machine_code("tail.cu")
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", said)
    # Per element and head_dim: forward with and without gates, two passes; rounding, and sums.
    assert memory == [("0", "0")] * (2 * 2 * 4 + 2 + 1) and not re.search(r"C75\d\d", said), said
    if (nvdisasm := sass.disassembler()) is None:
        pytest.skip("there is no nvdisasm on this machine")
    found = list(sass.disassembled(cubins[0], nvdisasm))
    assert len(found) == 16
    for part in found:
        body = (code := sass.parse(part))[0][sass.main_loop(*code)]
        kind = next(kind for kind in TAIL_PRODUCTS if kind in part.split(":")[0])
        products = TAIL_PRODUCTS[kind]["Li128E" in part.split(":")[0]]
        assert sum("HGMMA" in line for line in body) == products, kind
        assert sass.overlapped(body) >= 32, kind


def test_scores_of_runs_stay_in_registers_and_run_while_products_are_in_flight(
    machine_code,
) -> None:
    cubins, said = machine_code("sub_blocks.cu")
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", said)
    assert memory == [("0", "0")] * (8 + 8) and not re.search(r"C75\d\d", said), said
    # Scores are launched with what three warpgroups may have; means have eight blocks at a time.
    registers = sorted(map(int, re.findall(r"Used (\d+) registers", said)))
    assert registers[8:] == [168] * 8 and registers[7] <= 64
    if (nvdisasm := sass.disassembler()) is None:
        pytest.skip("there is no nvdisasm on this machine")
    for part in sass.disassembled(cubins[0], nvdisasm):
        code, _ = sass.parse(part)
        waits = [i for i, line in enumerate(code) if "WARPGROUP.DEPBAR" in line]
        assert len(waits) == 3 and "0x1" in code[waits[0]]
        # All 64 exponentials of a lane lie between the waits of the main loop's two steps.
        assert sum("MUFU.EX2" in line for line in code[waits[0] : waits[1]]) == 64
        # One multiplication, maximum, fused one, exponential and sum each, and what is around.
        assert waits[1] - waits[0] <= (420 if "Lb0E" in part.split(":")[0] else 580)


def test_softmax_runs_while_products_are_in_flight(compiled) -> None:
    for kernel in compiled[0]:
        assert kernel.products in sass.PRODUCTS[kernel.kind]
        least = sass.LEAST_OVERLAPPED.get((kernel.kind, kernel.head_dim), 32)
        assert kernel.overlapped >= least, kernel


def test_the_main_loop_stays_within_its_instruction_budget(compiled) -> None:
    for kernel in compiled[0]:
        assert not sass.overruns(kernel)


def test_what_a_budget_does_not_allow_is_named() -> None:
    held = sass.Kernel("FineForward Li128E Bf16", 128, 0, 0, 0, 700, 40, 64, 250, 12, 32)
    assert not sass.overruns(held)
    for field, value in {
        "local": 1,
        "executed": 261,
        "mask": 0,
        "rescale": 0,
        "products": 11,
        "overlapped": 31,
    }.items():
        (fault,) = sass.overruns(replace(held, **{field: value}))
        assert fault.startswith(f"forward bf16 d128: {value} ")


def test_spills_in_a_loop_would_be_seen() -> None:
    code = ["NOP", "UTMALDG.5D", "STL [R1], R2", "UTMALDG.5D", "@P0 BRA `(.L_x_1)", "LDL R2, [R1]"]
    assert code[sass.copy_loop(code, {".L_x_1": 1})] == code[1:5]


def test_a_hoisted_wait_would_be_seen() -> None:
    wait1, wait0 = "WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    group, exps = ["HGMMA R0", "HGMMA R0, gsb0"], ["MUFU.EX2 R1, R2"] * 32
    assert sass.overlapped([*group, *group, wait1, *exps, wait0]) == 32
    assert sass.overlapped([*group, *group, wait1, wait0, *exps]) == 0
    assert sass.overlapped([*group, wait0, "HGMMA R0", *exps, "HGMMA R0, gsb0", wait0]) == 32


def test_the_shortest_way_around_the_loop_is_counted() -> None:
    code = [
        "HGMMA R0",
        "@P0 BRA `(.L_x_1)",
        *["FMUL R0, R0, R1"] * 64,  # what a branch may skip
        "@!P1 BRA `(.L_x_2)",  # on to what is rare
        "BRA `(.L_x_0)",
        "SYNCS.ARRIVE",
        "BRA `(.L_x_0)",
        "EXIT",
    ]
    labels = {".L_x_0": 0, ".L_x_1": 66, ".L_x_2": 68}
    assert sass.shortest_round(code, labels, slice(0, 70)) == 4
    with pytest.raises(SystemExit, match="no way back to its first product"):
        sass.shortest_round(["HGMMA R0", "EXIT", "NOP"], {}, slice(0, 2))
