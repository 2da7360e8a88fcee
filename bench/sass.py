# SPDX-License-Identifier: Apache-2.0
"""What ptxas made of the kernels: registers, spills, and the main loop instruction by instruction.

usage: python bench/sass.py

Compiles the kernels for sm_90a (no GPU needed) and prints a table. An overlapped softmax reads
"products, wait<1>, exponentials, wait<0>" in the machine code; ptxas may hoist the second wait
above the exponentials in silence, so how many of them have products in flight is a column.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ("-std=c++20", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=-v", "-cubin")
SOURCES = ("fine_forward.cu", "fine_backward.cu")  # of attention

# Budgets: what the kernels that were measured hold. A change may lower them.
MOST_EXECUTED = {
    "forward": {128: 260, 64: 240},
    "dK dV": {128: 365, 64: 290},
    "dQ": {128: 270, 64: 240},
    "one pass": {64: 335},
}
"""Instructions of a warp per tile that needs no mask, by kernel and head_dim."""
MOST_FOR_A_MASK = 60
"""Instructions more per tile that needs one."""
LEAST_OVERLAPPED = {("dK dV", 128): 29, ("one pass", 64): 29}
"""Exponentials with products in flight, where they are not all 32 of a lane's tile."""
PRODUCTS = {"forward": (8, 12), "dK dV": (16, 24), "dQ": (12, 20), "one pass": (16,)}
"""HGMMA instructions per tile, at a head_dim of 64 and 128."""


@dataclass(frozen=True)
class Kernel:
    """One kernel as compiled.

    Attributes:
        name: mangled.
        registers: per thread at launch; roles take or give some later.
        stack: bytes of local memory per thread.
        spills: bytes stored and loaded. The scheduler's, a warp that has time
            (kernels/schedule/tile_scheduler.h).
        local: accesses to local memory in the main loop and between two copies of the producer.
        loop: instructions of the main loop, everything included.
        mask: of these, skipped on a tile that needs no mask.
        rescale: of these, skipped when no maximum of the warp moved.
        executed: of these, what a warp issues for a tile that needs neither and ends no chunk.
        products: HGMMA instructions in the loop.
        overlapped: exponentials with products in flight, of 32.
    """

    name: str
    registers: int
    stack: int
    spills: int
    local: int
    loop: int
    mask: int
    rescale: int
    executed: int
    products: int
    overlapped: int

    @property
    def kind(self) -> str:
        """What it computes."""
        kinds = {
            "FineForward": "forward",
            "OnePassConfig": "one pass",
            "BackwardKeys": "dK dV",
            "BackwardQueries": "dQ",
        }
        return next(label for part, label in kinds.items() if part in self.name)

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return 128 if "Li128E" in self.name else 64

    @property
    def label(self) -> str:
        """Readable: what it computes, element and head_dim."""
        element = "bf16" if "Bf16" in self.name else "fp16"
        gates = " with gates" if "GatedOutput" in self.name else ""
        return f"{self.kind} {element} d{self.head_dim}{gates}"


def compile_kernels(
    nvcc: str, folder: Path, sources: tuple[str, ...] = SOURCES
) -> tuple[list[Path], str]:
    """The cubins and everything that nvcc and ptxas said."""
    cubins, said = [], ""
    for source in sources:
        cubin = folder / f"{source}bin"
        command = [nvcc, *FLAGS, f"-I{ROOT / 'csrc'}", str(ROOT / "csrc/launch" / source)]
        done = subprocess.run([*command, "-o", str(cubin)], capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"nvcc failed on {source}:\n{done.stderr}")
        cubins.append(cubin)
        said += done.stdout + done.stderr
    return cubins, said


def disassembler() -> str | None:
    """The program nvdisasm, from its wheel or from PATH."""
    spec = find_spec("nvidia")
    for part in (spec.submodule_search_locations or ()) if spec else ():
        if (program := Path(part) / "cu13/bin/nvdisasm").exists():
            return str(program)
    return shutil.which("nvdisasm")


def disassembled(cubin: Path, nvdisasm: str) -> Iterator[str]:
    """The machine code of each kernel that multiplies matrices, its name first."""
    command = [nvdisasm, "-c", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    yield from (part for part in re.split(r"\n\.text\.", text)[1:] if "HGMMA" in part)


def kernels(cubins: list[Path], said: str, nvdisasm: str) -> Iterator[Kernel]:
    """All kernels of attention."""
    for cubin in cubins:
        for part in disassembled(cubin, nvdisasm):
            name = part.split(":")[0]
            report = said[said.index(f"Function properties for {name}") :]
            stack, stores, loads = map(
                int,
                re.search(
                    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
                    report,
                ).groups(),
            )
            registers = int(re.search(r"Used (\d+) registers", report)[1])
            code, labels = parse(part)
            loop = main_loop(code, labels)
            body = code[loop]
            copying = code[copy_loop(code, labels)]
            yield Kernel(
                name,
                registers,
                stack,
                stores + loads,
                sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in body + copying),
                len(body),
                skipped(code, labels, loop, "FSEL"),
                skipped(code, labels, loop, "FMUL"),
                shortest_round(code, labels, loop),
                sum("HGMMA" in line for line in body),
                overlapped(body),
            )


def shared_memory(folder: Path) -> str:
    """Bytes of shared memory that a block of each kernel takes, a line each."""
    source, program = folder / "sizes.cpp", folder / "sizes"
    names = ("FineForward", "FineBackwardKeys", "FineBackwardQueries")
    found = [(name, f"{name}Config", d) for name in names for d in (128, 64)]
    found.append(("FineBackwardKeys", "FineBackwardOnePassConfig", 64))
    prints = "".join(
        f'  std::printf("{config.removesuffix("Config")} d{d}: %zu B\\n", '
        f"sizeof(vsa::{name}<vsa::{config}<vsa::Bf16, {d}>>::SharedMemory));\n"
        for name, config, d in found
    )
    headers = "".join(
        f'#include "kernels/{name}.h"\n'
        for name in ("fine/forward", "fine/backward_keys", "fine/backward_queries")
    )
    source.write_text(f"#include <cstdio>\n{headers}int main() {{\n{prints}}}\n")
    command = ["c++", "-std=c++20", f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    return subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout


def parse(text: str) -> tuple[list[str], dict[str, int]]:
    """Instructions without addresses, and where each label stands among them."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        if instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(instruction[1])
    return code, labels


def loops(code: list[str], labels: dict[str, int]) -> Iterator[slice]:
    """Everything between a label and a branch back to it."""
    for end, line in enumerate(code):
        jump = re.search(r"BRA.*?(\.L_x_\d+)", line)
        begin = labels.get(jump[1], len(code)) if jump else len(code)
        if begin <= end:
            yield slice(begin, end + 1)


def smallest(found: Iterator[slice]) -> slice:
    """The shortest loop."""
    return min(found, key=lambda loop: loop.stop - loop.start)


def main_loop(code: list[str], labels: dict[str, int]) -> slice:
    """The smallest loop around products and a tile of exponentials."""

    def is_main(body: list[str]) -> bool:
        return sum("MUFU.EX2" in x for x in body) >= 32 and any("HGMMA" in x for x in body)

    return smallest(loop for loop in loops(code, labels) if is_main(code[loop]))


def copy_loop(code: list[str], labels: dict[str, int]) -> slice:
    """The smallest loop around copies of tiles by TMA: the producer's."""

    def is_copying(body: list[str]) -> bool:
        return sum("UTMALDG" in x for x in body) >= 2 and not any("HGMMA" in x for x in body)

    return smallest(loop for loop in loops(code, labels) if is_copying(code[loop]))


def skipped(code: list[str], labels: dict[str, int], loop: slice, kind: str) -> int:
    """Instructions of the loop that a branch jumps over together with at least 32 of one kind."""
    best = 0
    for i in range(loop.start, loop.stop):
        jump = re.match(r"@.*BRA.*?(\.L_x_\d+)", code[i])
        target = labels.get(jump[1], 0) if jump else 0
        inside = code[i + 1 : target]
        busy = any("HGMMA" in x or "MUFU.EX2" in x for x in inside)
        if i < target <= loop.stop and not busy and sum(kind in x for x in inside) >= 32:
            best = max(best, len(inside))
    return best


def shortest_round(code: list[str], labels: dict[str, int], loop: slice) -> int:
    """Instructions of the shortest way from the loop's first product back to it.

    That is a tile that needs no mask, in which no maximum moved, and after which no chunk ends.
    """
    start = next(i for i in range(loop.start, loop.stop) if "HGMMA" in code[i])
    reached, steps = {start}, 0
    while reached:
        steps += 1
        reached = {after for i in reached for after in successors(code, labels, i)}
        if start in reached:
            return steps
    raise SystemExit("a main loop has no way back to its first product")


def successors(code: list[str], labels: dict[str, int], i: int) -> list[int]:
    """Where the instruction may lead."""
    jump = re.search(r"\bBRA\b.*?(\.L_x_\d+)", code[i])
    found = [labels[jump[1]]] if jump else []
    if code[i].startswith("@") or not re.search(r"\b(BRA|EXIT|RET)\b", code[i]):
        found.append(i + 1)
    return [after for after in found if after < len(code)]


def overlapped(body: list[str]) -> int:
    """Exponentials with products in flight, the loop taken as a ring."""
    flying, opened, count = 0, False, 0  # closed groups, one that is still open, exponentials
    for line in [*body, *body]:
        if wait := re.search(r"WARPGROUP\.DEPBAR\S* gsb0, 0x(\w+)", line):
            flying = min(flying, int(wait[1], 16))
        elif "HGMMA" in line:
            opened = "gsb0" not in line
            flying += not opened
        elif "MUFU.EX2" in line and (flying or opened):
            count += 1
    return count // 2


def overruns(k: Kernel) -> list[str]:
    """Which budgets a kernel does not hold, a sentence each."""
    most, least = MOST_EXECUTED[k.kind][k.head_dim], LEAST_OVERLAPPED.get((k.kind, k.head_dim), 32)
    faults = {
        f"{k.local} accesses to local memory in its loops": k.local > 0,
        f"{k.executed} instructions for a tile instead of {most}": k.executed > most,
        f"{k.mask} instructions for a mask, at most {MOST_FOR_A_MASK} where it has one": (
            k.mask > MOST_FOR_A_MASK or (k.mask > 0) != (k.kind not in ("dK dV", "one pass"))
        ),
        f"{k.rescale} instructions that rescale, 32 or more in a forward alone": (
            (k.rescale >= 32) != (k.kind == "forward")
        ),
        f"{k.products} products": k.products not in PRODUCTS[k.kind],
        f"{k.overlapped} exponentials instead of {least} beside products": k.overlapped < least,
    }
    return [f"{k.label}: {fault}" for fault, found in faults.items() if found]


def table(found: list[Kernel]) -> str:
    """Markdown."""
    head = "kernel, registers, stack and spills, in loops, loop, mask, rescale, executed, HGMMA"
    lines = [f"| {head.replace(', ', ' | ')} | exp overlapped |", "|" + " --- |" * 10]
    for k in found:
        lines.append(
            f"| {k.label} | {k.registers} | {k.stack}, {k.spills} B | {k.local} | {k.loop} | "
            f"{k.mask} | {k.rescale} | **{k.executed}** | {k.products} | {k.overlapped} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    nvcc, nvdisasm = shutil.which("nvcc"), disassembler()
    if nvcc is None or nvdisasm is None:
        raise SystemExit("nvcc and nvdisasm are needed (pip install nvidia-cuda-nvdisasm)")
    with tempfile.TemporaryDirectory() as folder:
        cubins, said = compile_kernels(nvcc, Path(folder))
        print(table(list(kernels(cubins, said, nvdisasm))))
        print(f"\nShared memory of a block, of 232,448 B:\n{shared_memory(Path(folder))}", end="")


if __name__ == "__main__":
    main()
