# SPDX-License-Identifier: Apache-2.0
"""8-bit numbers and fp8 sums of the emulator against their definitions, PyTorch and a GPU."""

from __future__ import annotations

import gzip
import math
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.facts_library import Facts, address, load

CODES = torch.arange(256, dtype=torch.uint8)
LARGEST, NAN = 0x7E, 0x7F
CODE_UNIT = 2.0**-24
"""What stands for a code of 1 (operand8.h)."""


def test_e4m3_codes_are_pytorchs(facts: Facts):
    ours, theirs = facts.from_e4m3(CODES), CODES.view(torch.float8_e4m3fn).float()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    finite = ~ours.isnan()
    assert facts.to_e4m3(ours)[finite].tolist() == CODES[finite].tolist()
    assert facts.to_e4m3(ours)[~finite].tolist() == [NAN, NAN]


def test_e4m3_rounds_to_the_nearest_and_ties_to_even(facts: Facts):
    x = facts.from_e4m3(CODES[: LARGEST + 1]).double()
    middle = (x[:-1] + x[1:]) / 2
    even = [code + code % 2 for code in range(LARGEST)]
    assert facts.to_e4m3(middle).tolist() == even
    below, above = (torch.nextafter(middle.float(), x[i].float()) for i in (0, -1))
    assert facts.to_e4m3(below).tolist() == list(range(LARGEST))
    assert facts.to_e4m3(above).tolist() == list(range(1, LARGEST + 1))


@settings(deadline=None)
@given(st.lists(st.floats(-448, 448, width=32), min_size=1, max_size=50))
def test_e4m3_rounds_as_pytorch_does(facts: Facts, numbers):
    x = torch.tensor(numbers)
    assert torch.equal(facts.to_e4m3(x), x.to(torch.float8_e4m3fn).view(torch.uint8))


def test_what_e4m3_does_not_have_becomes_its_largest_number_or_nan(facts: Facts):
    x = torch.tensor([449.0, 464.0, 465.0, 1e30, torch.inf, torch.nan])
    assert facts.to_e4m3(x).tolist() == [LARGEST] * 5 + [NAN]
    assert facts.to_e4m3(-x[:5]).tolist() == [LARGEST | 0x80] * 5


def test_fours_are_in_order(facts: Facts):
    x = torch.tensor([[1.0, -2.0, 448.0, torch.nan], [0.0, 0.5, -0.0, 1e9]])
    assert torch.equal(facts.pack8(x, "e4m3"), facts.to_e4m3(x))
    x = torch.tensor([[127.0, -127.0, 0.5, 1.5], [-0.5, -1.5, 126.49, -126.51]])
    wanted = [[127, -127, 0, 2], [0, -2, 126, -127]]
    assert facts.pack8(x, "s8").view(torch.int8).tolist() == wanted


def test_line_codes_are_integers_and_e4m3_of_powers_of_two(facts: Facts):
    x = torch.tensor([[0.0, -5.0, 119.4, 120.0], [0.5, 1.5, 2.5, torch.nan]])
    assert facts.line_fours(x * CODE_UNIT).tolist() == [[0, 0, 119, 120], [0, 2, 2, 255]]
    exponents = torch.arange(-6, 9)
    units = CODE_UNIT * 8.0 * (exponents + 7)
    codes = facts.line_fours(units.repeat(4).view(-1, 4)).flatten()[:15]
    assert torch.equal(facts.from_e4m3(codes), torch.exp2(exponents.float()))


def fp8_sum(left: list[float], right: list[float], start: float) -> float:
    """By definition: units of 2^-13 of the largest exponent, cut off; then the sum's own."""

    def exponent(x: float, least: float = -math.inf) -> float:
        return max(math.frexp(x)[1] - 1, least)

    factors = list(zip(left, right, strict=True))
    exponents = [exponent(a, -6) + exponent(b, -6) for a, b in factors if a * b]
    exponents += [exponent(start)] if start else []
    if not exponents:
        return 0.0
    unit = 2.0 ** (max(exponents) - 13)
    total = sum(int(x / unit) for x in [start, *(a * b for a, b in factors)])
    kept = max(1, 2 ** (abs(total).bit_length() - 14))
    return int(total / kept) * kept * unit


def draw_codes(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Any e4m3 codes but NaN."""
    codes = torch.randint(0, 127, shape, generator=generator, dtype=torch.uint8)
    return codes | torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8) << 7


def test_fp8_sums_are_cut_off(facts: Facts):
    generator = torch.Generator().manual_seed(0)
    a, b = (facts.from_e4m3(draw_codes(generator, 500, 32)) for _ in range(2))
    start = torch.randn(500, generator=generator) * 2.0 ** torch.randint(-8, 20, (500,))
    start[0] = 0
    a[0] = 0
    each = zip(a.tolist(), b.tolist(), start.tolist(), strict=True)
    assert facts.sum_fp8(a, b, start).tolist() == [fp8_sum(*one) for one in each]
    a[:, 3] = torch.nan
    assert facts.sum_fp8(a, b, start).isnan().all()


def test_a_product_has_the_exponents_of_its_factors(facts: Facts):
    """Beside 1.5 x 1.5 what lies 13 bits below one is kept, and beside 2 x 1 it is not."""
    left, right = torch.zeros(2, 32), torch.zeros(2, 32)
    left[:, 0], right[:, 0] = torch.tensor([1.5, 2.0]), torch.tensor([1.5, 1.0])
    left[:, 1], right[:, 1] = 2.0**-7, 2.0**-6
    start = torch.tensor([-1.25, -1.0])
    assert facts.sum_fp8(left, right, start).tolist() == [1 + 2.0**-13, 1.0]


@pytest.mark.parametrize(
    ("keys", "bias"), [(512, -0.0012), (1024, -0.0057), (2048, -0.020), (8192, -0.129)]
)
def test_row_sums_fall_short_as_measured_on_an_h200(facts: Facts, keys, bias):
    """Sums of the weights of N(0,1) scores, whose bias bench has from a GPU."""
    scores = torch.randn(64, 8192, generator=torch.Generator().manual_seed(1)) / torch.log(
        torch.tensor(2.0)
    )
    weights = torch.exp2(scores - scores.amax(1, keepdim=True) + 8)
    weights = facts.from_e4m3(facts.to_e4m3(weights))[:, :keys]
    sums = torch.zeros(64)
    for first in range(0, keys, 32):
        sums = facts.sum_fp8(weights[:, first : first + 32], torch.ones(32), sums)
    found = (sums / weights.double().sum(1) - 1).mean().item()
    assert abs(found - bias) < 0.06 * abs(bias) + 1e-4


def test_sums_are_those_that_an_h200_gave(facts: Facts):
    """One block of each kind of bench/fp8_sums.py."""
    with gzip.open(Path(__file__).parent / "fp8_sums_h200.pt.gz") as file:
        kinds = torch.load(file, weights_only=True)
    assert len(kinds) == 12
    for name, of in kinds.items():
        left, right = _factors(facts, of["a"], of["b"])
        found = facts.sum_fp8(left, right, of["start"].flatten(), in_halves=of["held"] == 1)
        assert torch.equal(found, of["found"].flatten()), name


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    """tests/cpp/facts8.cu on the GPU."""
    if not torch.cuda.is_available() or (nvcc := shutil.which("nvcc")) is None:
        pytest.skip("needs a CUDA device and nvcc")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    target = "-gencode=arch=compute_90a,code=sm_90a"
    flags = ["-std=c++20", target, "-shared", "-Xcompiler=-fPIC"]
    return load([nvcc, *flags], "facts8.cu", tmp_path_factory.mktemp("facts8"))


@pytest.mark.gpu
@pytest.mark.parametrize("which", [0, 1, 2])
def test_device_converts_as_the_emulator(facts: Facts, device, which):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4096, 4, generator=generator) * 2.0 ** torch.randint(-12, 10, (4096, 4))
    x[:4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 464.0])
    if which == 1:
        x = x.nan_to_num(0).clamp(-127, 127)
    elif which == 2:
        x = x.clamp(max=126) * CODE_UNIT
        x[:4, 2] = torch.nan
    wanted = facts.line_fours(x) if which == 2 else facts.pack8(x, ("e4m3", "s8")[which])
    given, found = x.cuda(), torch.zeros(x.shape, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    assert device.device_convert(address(given), len(x), which, address(found)) == 0
    assert torch.equal(found.cpu(), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("start", [False, True])
def test_device_sums_fp8_products_as_the_emulator(facts: Facts, device, start):
    generator = torch.Generator().manual_seed(3)
    a, b = (draw_codes(generator, 64, 64, 32) for _ in range(2))
    exponents = torch.randint(-8, 20, (64, 64, 64), generator=generator)
    sums = torch.randn(64, 64, 64, generator=generator) * 2.0**exponents * start
    left, right = _factors(facts, a, b)
    wanted = facts.sum_fp8(left, right, sums.flatten()).view(64, 64, 64)
    found = _one_step(device, 0, a, b, sums)
    wrong = found != wanted
    exact = (left * right).double().sum(-1).view(64, 64, 64) + sums
    message = (
        f"{wrong.float().mean():.2%} differ, by up to "
        f"{((found - wanted).abs() / exact.abs()).max():.2e} of the sum; first: "
        f"{found[wrong][:4].tolist()}, not {wanted[wrong][:4].tolist()}"
    )
    assert not wrong.any(), message


@pytest.mark.gpu
def test_device_sums_into_halves_as_the_emulator(facts: Facts, device):
    generator = torch.Generator().manual_seed(4)
    a, b = (facts.to_e4m3(torch.randn(64, 64, 32, generator=generator) * 4) for _ in range(2))
    sums = (torch.randn(64, 64, 64, generator=generator) * 50).half().float()
    left, right = _factors(facts, a, b)
    wanted = facts.sum_fp8(left, right, sums.flatten(), in_halves=True).view(64, 64, 64)
    found = _one_step(device, 1, a, b, sums)
    assert not (found != wanted).any(), f"{(found != wanted).float().mean():.2%} differ"


@pytest.mark.gpu
def test_device_sums_s8_products_exactly(device):
    generator = torch.Generator().manual_seed(5)
    a, b = (
        torch.randint(-128, 128, (8, 64, 32), generator=generator, dtype=torch.int8)
        for _ in range(2)
    )
    sums = torch.randint(-(2**20), 2**20, (8, 64, 64), generator=generator).float()
    found = _one_step(device, 2, a, b, sums)
    assert torch.equal(found.double(), sums.double() + a.double() @ b.double().mT)


def _factors(facts, a, b):
    """Numbers of codes a and b (n, 64, 32) for each of n x 64 x 64 sums, (sums, 32) each."""
    left, right = facts.from_e4m3(a)[:, :, None], facts.from_e4m3(b)[:, None]
    shape = -1, 64, 64, 32
    return left.expand(shape).flatten(0, 2), right.expand(shape).flatten(0, 2)


def _one_step(device, which, a, b, sums):
    """Sums (n, 64, 64) + a b^T for bytes a and b (n, 64, 32), by the tensor cores."""
    a, b, sums = a.cuda(), b.cuda(), sums.cuda()
    torch.cuda.synchronize()
    assert device.device_one_step(which, len(a), address(a), address(b), address(sums)) == 0
    return sums.cpu()
