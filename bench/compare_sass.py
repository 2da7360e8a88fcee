# SPDX-License-Identifier: Apache-2.0
"""Whether two builds hold the same machine code: the proof that a move or rename changed nothing.

usage: python bench/compare_sass.py OLD NEW

OLD and NEW are checkouts of this repository, or folders of cubins. Checkouts are compiled, which
takes minutes and no GPU. Of each kernel the bytes of its instructions are compared, and with them
registers, constants, shared memory and where the linker would write. Names are not: they change
with every rename, so the kernels of both sides pair up by what they hold.
"""

from __future__ import annotations

import hashlib
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FLAGS = ("-std=c++20", "-O3", "-DNDEBUG", "-gencode=arch=compute_90a,code=sm_90a", "-cubin")
NOBITS = 8  # the type of an ELF section that has a size and no bytes


@dataclass(frozen=True)
class Section:
    """A section of an ELF file: its name, two numbers of its header, and its bytes."""

    name: str
    info: int
    size: int
    content: bytes


def sections(elf: bytes) -> Iterator[Section]:
    """All sections of a 64-bit ELF file."""
    (at,) = struct.unpack_from("<Q", elf, 0x28)
    entry, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, at + i * entry) for i in range(count)]
    for name, kind, _, _, offset, size, _, info, _, _ in headers:
        start = headers[names][4] + name
        content = b"" if kind == NOBITS else elf[offset : offset + size]
        yield Section(elf[start : elf.index(b"\0", start)].decode(), info, size, content)


def digest(kernel: str, all_sections: list[Section]) -> str:
    """Of everything that the GPU is given for a kernel; equal for equal kernels of any name."""
    found = hashlib.sha256()
    for section in sorted(all_sections, key=lambda section: section.name):
        kind = section.name.removesuffix(f".{kernel}")
        if kind == section.name:
            continue
        if kind == ".text":
            # The upper byte of the header's info is the number of registers.
            found.update(struct.pack("<I", section.info >> 24) + section.content)
        elif kind.startswith(".rel"):
            # Offset and type of every place that is linked, without the index of its symbol.
            size = 24 if kind.startswith(".rela") else 16
            for offset, at in struct.iter_unpack(f"<QI{size - 12}x", section.content):
                found.update(struct.pack("<QI", offset, at))
        elif kind.startswith((".nv.constant", ".nv.shared", ".nv.local")):
            found.update(f"{kind} {section.size}".encode() + section.content)
    return found.hexdigest()


def kernels(cubins: list[Path]) -> dict[str, list[str]]:
    """Names of all kernels by their digests."""
    found = defaultdict(list)
    for cubin in cubins:
        everything = list(sections(cubin.read_bytes()))
        for section in everything:
            if section.name.startswith(".text."):
                name = section.name.removeprefix(".text.")
                found[digest(name, everything)].append(f"{cubin.stem}: {name}")
    return found


def cubins(source: Path, folder: Path) -> list[Path]:
    """Those in a folder, or those of a checkout, compiled into ``folder``."""
    if found := sorted(source.glob("*.cubin")):
        return found
    nvcc, launch = shutil.which("nvcc"), source / "csrc" / "launch"
    if nvcc is None or not launch.is_dir():
        raise SystemExit(f"{source} holds no cubins, nor a checkout that an nvcc could compile")
    folder.mkdir()
    for file in sorted(launch.glob("*.cu")):
        target = folder / f"{file.stem}.cubin"
        subprocess.run([nvcc, *FLAGS, f"-I{source / 'csrc'}", file, "-o", target], check=True)
    return sorted(folder.glob("*.cubin"))


def compare(old: dict[str, list[str]], new: dict[str, list[str]]) -> tuple[int, list[str]]:
    """How many kernels both sides have alike, and a line for each that only one has."""
    same, lines = 0, []
    for code in {**old, **new}:
        before, after = old.get(code, []), new.get(code, [])
        same += min(len(before), len(after))
        lines += [f"only in OLD: {name}" for name in before[len(after) :]]
        lines += [f"only in NEW: {name}" for name in after[len(before) :]]
    return same, sorted(lines)


def main() -> None:
    """Print what is the same and name what is not."""
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        old, new = (
            kernels(cubins(Path(source), Path(folder, side)))
            for source, side in zip(sys.argv[1:], ("old", "new"), strict=True)
        )
    same, different = compare(old, new)
    print(f"{same} kernels hold the same machine code on both sides, {len(different)} do not")
    print("\n".join(different))
    if different:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
