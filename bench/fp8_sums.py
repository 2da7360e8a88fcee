# SPDX-License-Identifier: Apache-2.0
"""How the tensor cores add up fp8 products: sums recorded on a GPU, and what would explain them.

usage: python bench/fp8_sums.py --record FILE.pt.gz
       python bench/fp8_sums.py FILE.pt.gz

The first multiplies twelve kinds of e4m3 numbers by one step of 32 products, in blocks of 64 x 64
sums (tests/cpp/facts8.cu; a Hopper GPU and nvcc), and keeps inputs and sums. The second prints what
share of the recorded sums each of some models gets wrong, on any machine. One block of each kind,
as an H200 gave it, is tests/kernels/fp8_sums_h200.pt.gz, to which a test holds the emulator.
"""

from __future__ import annotations

import argparse
import gzip
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

TESTS = Path(__file__).resolve().parents[1] / "tests"
FP32, HALVES = 0, 1
"""What a sum is held in, as tests/cpp/facts8.cu counts."""


class Recorded(NamedTuple):
    """Inputs and sums of one kind.

    Attributes:
        a: (n, 64, 32) uint8, codes of e4m3 numbers.
        b: likewise; each row of a meets each row of b.
        start: (n, 64, 64) fp32, the accumulators before.
        held: ``FP32`` or ``HALVES``.
        found: (n, 64, 64) fp32, the accumulators after one step; None before it was recorded.
    """

    a: Tensor
    b: Tensor
    start: Tensor
    held: int
    found: Tensor | None = None


def kinds(blocks: int) -> Iterator[tuple[str, Recorded]]:
    """Inputs by name; the same every time."""
    random = torch.Generator().manual_seed(11)

    def codes(low: int, high: int) -> Tensor:
        """Of either sign, magnitudes from ``low`` on and below ``high``."""
        shape = blocks, 64, 32
        found = torch.randint(low, high, shape, generator=random, dtype=torch.uint8)
        return found | torch.randint(0, 2, shape, generator=random, dtype=torch.uint8) << 7

    def starts(low: int, high: int) -> Tensor:
        """Normal numbers times powers of two of such exponents."""
        numbers = normal()
        return numbers * 2.0 ** torch.randint(low, high, numbers.shape, generator=random)

    def normal() -> Tensor:
        return torch.randn(blocks, 64, 64, generator=random)

    zero = torch.zeros(blocks, 64, 64)
    yield "any, from zero", Recorded(codes(0, 127), codes(0, 127), zero, FP32)
    yield "any, from a start", Recorded(codes(0, 127), codes(0, 127), starts(-8, 20), FP32)
    yield "two binades, from zero", Recorded(codes(48, 64), codes(48, 64), zero, FP32)
    yield "two binades, from a start", Recorded(codes(48, 64), codes(48, 64), starts(-4, 6), FP32)
    a, b = _pairs(blocks)
    yield "a large and a small product", Recorded(a, b, zero, FP32)
    for name, start in (("above", 1.9999998), ("below", -1.9999998)):
        yield f"the same, from {name} zero", Recorded(a, b, torch.full_like(zero, start), FP32)
    one, other = (codes(1, 127) for _ in "ab")
    one[:, :, 1:] = 0
    other[:, :, 1:] = 0
    yield "one product, from a start", Recorded(one, other, starts(-8, 20), FP32)
    yield "no product, from a start", Recorded(one * 0, other, normal(), FP32)
    yield "positive", Recorded(codes(1, 127) & 127, codes(1, 127) & 127, zero, FP32)
    yield "halves, from zero", Recorded(codes(30, 80), codes(30, 80), zero, HALVES)
    a, b = (codes(30, 80) for _ in "ab")
    yield "halves, from a start", Recorded(a, b, (normal() * 50).half().float(), HALVES)


def _pairs(blocks: int) -> tuple[Tensor, Tensor]:
    """A large product and one of many small sizes, in places of their own in each block."""
    a, b = (torch.zeros(blocks, 64, 32, dtype=torch.uint8) for _ in "ab")
    row = torch.arange(64)
    for block in range(blocks):
        large, small = [(0, 1), (0, 16), (3, 31), (8, 24)][block % 4]
        a[block, :, large] = b[block, :, large] = (12 << 3 | row % 8).byte()
        a[block, :, small] = (row // 8 << 3 | 7 | row % 2 << 7).byte()
        b[block, :, small] = (row // 8 + 3 << 3 | 5).byte()
    return a, b


def recorded(blocks: int) -> dict[str, Recorded]:
    """All kinds on the GPU of this machine."""
    sys.path.insert(0, str(TESTS))
    from kernels.facts_library import address, load

    target = "-gencode=arch=compute_90a,code=sm_90a"
    command = ["nvcc", "-std=c++20", target, "-shared", "-Xcompiler=-fPIC"]
    with tempfile.TemporaryDirectory() as folder:
        device = load(command, "facts8.cu", Path(folder))
        found = {}
        for name, of in kinds(blocks):
            a, b, sums = (x.cuda() for x in of[:3])
            torch.cuda.synchronize()
            failed = device.device_one_step(of.held, blocks, *map(address, (a, b, sums)))
            if failed:
                raise SystemExit(f"fp8_sums.py: the GPU ended with error {failed}")
            found[name] = of._replace(found=sums.cpu())
    return found


class Model(NamedTuple):
    """What a step might do.

    Attributes:
        exponent: of a product: its factors' "sum", or its "own".
        bits: that are kept below the largest exponent of all terms.
        held: bits that an fp32 sum keeps below its leading one; None for all.
        down: whether terms are cut off downwards, not towards zero.
    """

    exponent: str
    bits: int
    held: int | None
    down: bool = False


MODELS = [
    *(Model(*each) for each in product(("sum", "own"), (12, 13, 14), (12, 13, 14, None))),
    Model("sum", 13, 13, down=True),
]


def sums(of: Recorded, model: Model) -> Tensor:
    """What a model makes of inputs, (n, 64, 64) fp64."""
    (a, exponent_a), (b, exponent_b) = (_parts(x) for x in (of.a, of.b))
    terms, start = a[:, :, None] * b[:, None], of.start.double()
    exponents = exponent_a[:, :, None] + exponent_b[:, None]
    if model.exponent == "own":
        exponents = _exponent(terms)
    exponents = exponents.where(terms != 0, -torch.inf)
    most = torch.maximum(exponents.amax(-1), _exponent(start))
    unit = torch.exp2(most.clamp(min=-1000) - model.bits)
    cut = torch.floor if model.down else torch.trunc
    found = (cut(terms / unit[..., None]).sum(-1) + cut(start / unit)) * unit
    if of.held == HALVES:
        return found.half().double()
    if model.held is None:
        return found
    unit = torch.exp2(_exponent(found).clamp(min=-1000) - model.held)
    return torch.trunc(found / unit) * unit


def _parts(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of codes, and their exponents, that of subnormal ones being the least."""
    return codes.view(torch.float8_e4m3fn).double(), (codes.long() >> 3 & 15).clamp(min=1) - 7.0


def _exponent(x: Tensor) -> Tensor:
    return torch.frexp(x).exponent.double().sub(1).where(x != 0, -torch.inf)


def main() -> None:
    """Record, or compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="compare its sums")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write sums of this GPU")
    parser.add_argument("--blocks", type=int, default=4, help="of 4,096 sums, of each kind")
    options = parser.parse_args()
    if (options.file is None) == (options.record is None):
        parser.error("name a file to compare, or one to --record")
    if options.record is not None:
        with gzip.open(options.record, "wb") as file:
            torch.save({name: of._asdict() for name, of in recorded(options.blocks).items()}, file)
        return
    with gzip.open(options.file) as file:
        content = torch.load(file, weights_only=True)
    kept = {name: Recorded(**of) for name, of in content.items()}
    print("| exponent of a product | terms keep | an fp32 sum keeps | wrong, by kind |")
    print("| --- | ---: | ---: | --- |")
    for model in MODELS:
        wrong = [(sums(of, model) != of.found.double()).double().mean() for of in kept.values()]
        words = "its " + ("factors'" if model.exponent == "sum" else "own")
        bits = f"{model.bits}{', down' * model.down} | {model.held or 'all'}"
        print(f"| {words} | {bits} | {' '.join(f'{share:.1%}' for share in wrong)} |")
    print("kinds:", "; ".join(kept))


if __name__ == "__main__":
    main()
