# SPDX-License-Identifier: Apache-2.0
"""csrc/prim/facts.h and 8-bit numbers for Python: tests/cpp/facts.cpp, loaded by ctypes.

Compiled here, a library of its own, since the product has no use for these functions.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vsa.values.grid import SLOTS

ROOT = Path(__file__).resolve().parents[2]
GridSizes = Sequence[int]
"""T, H, W, tile t, h, w, prefix, suffix."""


def load(command: Sequence[str | Path], source: str, folder: Path) -> ctypes.CDLL:
    """The library of a file of tests/cpp, compiled by a command that lacks only the files."""
    library = folder / f"{source}.so"
    done = subprocess.run(
        [*command, f"-I{ROOT / 'csrc'}", ROOT / "tests" / "cpp" / source, "-o", library],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def words(row: Iterable[int]) -> ctypes.Array:
    """An array of 32-bit words."""
    row = list(row)
    return (ctypes.c_uint32 * len(row))(*row)


def sizes(grid: GridSizes) -> ctypes.Array:
    """An array of eight ints."""
    return (ctypes.c_int * 8)(*grid)


def address(x: Tensor) -> ctypes.c_void_p:
    """Where a contiguous tensor's numbers are."""
    return ctypes.c_void_p(x.data_ptr())


class Facts:
    """The functions of the library, on lists."""

    def __init__(self, compiler: Path, folder: Path) -> None:
        flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        self._library = load([compiler, *flags], "facts.cpp", folder)
        self._library.softmax_weight.argtypes = [ctypes.c_float]
        self._library.softmax_weight.restype = ctypes.c_uint32
        self._library.test_bit.restype = ctypes.c_bool
        for name in ("lowest_bit", "highest_bit"):
            getattr(self._library, name).argtypes = [ctypes.c_uint32]

    def tile_table(
        self, grid: GridSizes
    ) -> tuple[list[tuple[int, ...]], list[int], list[list[int]]]:
        """Places (t, h, w, clip), row masks and the 64 tokens of every tile, -1 for none."""
        n = self._library.num_tiles(sizes(grid))
        places = (ctypes.c_int32 * 4 * n)()
        masks = (ctypes.c_uint64 * n)()
        tokens = (ctypes.c_int32 * SLOTS * n)()
        self._library.tile_table(sizes(grid), places, masks, tokens)
        return [tuple(place) for place in places], list(masks), [list(rows) for rows in tokens]

    def tile_and_row(self, grid: GridSizes, token: int) -> tuple[int, int]:
        """Where a token is; (-1, -1) for text."""
        numbers = sizes(grid)
        return self._library.tile_of(numbers, token), self._library.row_of(numbers, token)

    def pack(self, indices: Iterable[int], bits: int) -> list[int]:
        """A bitmap row with these bits."""
        row = words([0] * self._library.words(bits))
        for index in indices:
            self._library.set_bit(row, index)
        return list(row)

    def count(self, row: Sequence[int], bits: int) -> int:
        """Set bits of a row."""
        return self._library.count_bits(words(row), bits)

    def test(self, row: Sequence[int], bit: int) -> bool:
        """Whether a bit of a row is set."""
        return self._library.test_bit(words(row), bit)

    def lowest_and_highest(self, word: int) -> tuple[int, int]:
        """The set bits of a word at both its ends; (32, -1) for an empty one."""
        return self._library.lowest_bit(word), self._library.highest_bit(word)

    def transpose(self, bitmap: Sequence[int], rows: int, columns: int) -> list[int]:
        """[rows][words(columns)] -> [columns][words(rows)], flat."""
        out = words([0] * columns * self._library.words(rows))
        self._library.transpose_bits(words(bitmap), rows, columns, out)
        return list(out)

    def to_e4m3(self, x: Tensor) -> Tensor:
        """Codes, uint8, of floats."""
        x = x.float().contiguous()
        codes = torch.empty(x.shape, dtype=torch.uint8)
        self._library.to_e4m3(address(x), x.numel(), address(codes))
        return codes

    def from_e4m3(self, codes: Tensor) -> Tensor:
        """Floats of codes."""
        codes = codes.contiguous()
        x = torch.empty(codes.shape)
        self._library.from_e4m3(address(codes), codes.numel(), address(x))
        return x

    def pack8(self, x: Tensor, kind: Literal["e4m3", "s8"]) -> Tensor:
        """Bytes (..., 4), uint8, of floats (..., 4)."""
        x = x.float().contiguous()
        fours = torch.empty(x.shape, dtype=torch.uint8)
        self._library.pack8(address(x), x.numel() // 4, int(kind == "s8"), address(fours))
        return fours

    def line_fours(self, x: Tensor) -> Tensor:
        """Codes that are linear in the exponent, (..., 4) uint8, of floats (..., 4)."""
        x = x.float().contiguous()
        fours = torch.empty(x.shape, dtype=torch.uint8)
        self._library.line_fours(address(x), x.numel() // 4, address(fours))
        return fours

    def sum_fp8(
        self, left: Tensor, right: Tensor, start: Tensor, in_halves: bool = False
    ) -> Tensor:
        """What a step of fp8 products leaves in accumulators (n,): factors (n, 32), their start."""
        sums = start.float().clone()
        left, right = (x.float().expand(len(sums), -1).contiguous() for x in (left, right))
        self._library.sum_fp8(address(left), address(right), len(sums), in_halves, address(sums))
        return sums

    def softmax_weight(self, gap: float) -> int:
        """The weight of a score that lies so far below the largest of its row, 2^31 for 0."""
        return self._library.softmax_weight(gap)
