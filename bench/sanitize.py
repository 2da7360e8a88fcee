# SPDX-License-Identifier: Apache-2.0
"""Small cases of every kernel under compute-sanitizer, each held to the same case on PyTorch.

usage: python bench/sanitize.py [--tool memcheck racecheck ...] [--parts NAME ...] [--minutes M]
       python bench/sanitize.py --run NAME

Each part is a process of its own under each tool, which looks at this project's kernels alone,
initcheck at all: what is written by a kernel that it is told to leave out is to it memory that
nobody has written. A part that finds something, or whose numbers are wrong, is printed with what
the tool says, and the exit status is 1. --run computes one part without a tool, on a GPU or, where
there is none, on the emulator. racecheck knows TMA's copies only in part, so its silence says less
than memcheck's.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import vsa

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FOUND = 9
"""Exit status of a part in which the tool found something."""
GRID = (6, 9, 11)
"""Ragged along every axis: 12 whole tiles and 6 clipped ones in each pair of layers."""
HEADS, KEPT = 2, 5
DTYPES = torch.bfloat16, torch.float16
NEAR = 0.02
"""Largest error of native kernels, as a share of the root mean square."""
NEAR_IN_EIGHT_BITS = 0.12


def tensors(head_dim: int, dtype: torch.dtype, count: int, tokens: int) -> list[Tensor]:
    """Of N(0, 1), (1, tokens, HEADS, head_dim)."""
    generator = torch.Generator().manual_seed(head_dim)
    shape = count, 1, tokens, HEADS, head_dim
    return list(torch.randn(shape, generator=generator).to(dtype).unbind())


def each_kind() -> Iterator[tuple[int, torch.dtype]]:
    """Head dims and types."""
    for head_dim in (64, 128):
        for dtype in DTYPES:
            yield head_dim, dtype


def compare(
    what: str, call: Callable[..., Tensor], given: list[Tensor], near: float, backward: bool
) -> None:
    """Output and gradients of our kernels beside those of PyTorch on a CPU.

    Raises:
        SystemExit: if they differ.
    """
    gpu = torch.cuda.is_available()
    found = []
    for device, backend in (
        ("cuda" if gpu else "cpu", "auto" if gpu else "emulated"),
        ("cpu", "torch"),
    ):
        leaves = [x.detach().to(device).requires_grad_(backward) for x in given]
        out = call(*leaves, backend=backend)
        outs = [out]
        if backward:
            outs += torch.autograd.grad(out, leaves, torch.ones_like(out))
        found.append([x.detach().double().cpu() for x in outs])
    for name, one, other in zip(("out", "dq", "dk", "dv"), *found, strict=False):
        off = (one - other).pow(2).mean().sqrt() / other.pow(2).mean().sqrt()
        if not off <= near:
            raise SystemExit(f"sanitize.py: {name} of {what} is off by {off:.3f}")


def native() -> None:
    """The fine stage in both directions: two passes and one, with text and without."""
    for head_dim, dtype in each_kind():
        for repeat in (False, True):
            torch.use_deterministic_algorithms(repeat, warn_only=True)
            for text in (0, 70):
                grid = vsa.Grid(GRID, prefix=text)
                given = tensors(head_dim, dtype, 3, grid.length)
                selection = vsa.select(*given[:2], KEPT, grid=grid, backend="torch")
                compare(
                    f"native {head_dim} {dtype} {text}",
                    attention(grid, selection=selection),
                    given,
                    NEAR,
                    backward=True,
                )
    torch.use_deterministic_algorithms(False)


def attention(grid: vsa.Grid, **options: Any) -> Callable[..., Tensor]:
    """A call of ``vsa.attention`` with a selection that is moved to where the tensors are."""

    def call(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        moved = {
            key: x.to(q.device) if isinstance(x, vsa.Selection) else x for key, x in options.items()
        }
        return vsa.attention(q, k, v, None, grid=grid, backend=backend, **moved)

    return call


def low_precision() -> None:
    """The forward in eight bits."""
    for head_dim, dtype in each_kind():
        for precision in ("int8", "fp8"):
            for text in (0, 70):
                grid = vsa.Grid(GRID, prefix=text)
                given = tensors(head_dim, dtype, 3, grid.length)
                selection = vsa.select(*given[:2], KEPT, grid=grid, backend="torch")
                call = attention(grid, selection=selection, precision=precision)
                compare(
                    f"{precision} {head_dim} {dtype} {text}",
                    call,
                    given,
                    NEAR_IN_EIGHT_BITS,
                    backward=False,
                )


def tail() -> None:
    """Tiles that are not kept by their means."""
    for head_dim, dtype in each_kind():
        grid = vsa.Grid(GRID)
        given = tensors(head_dim, dtype, 3, grid.length)
        selection = vsa.select(*given[:2], KEPT, grid=grid, backend="torch")
        compare(
            f"tail {head_dim} {dtype}",
            attention(grid, selection=selection, tail=True),
            given,
            NEAR,
            backward=True,
        )


def whole_calls() -> None:
    """Means, choice, coarse branch and gates: finite, since near ties are chosen otherwise."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = "auto" if device == "cuda" else "emulated"
    for head_dim, dtype in each_kind():
        for score in ("mean", vsa.SubBlocks(8)):
            given = [
                x.to(device).requires_grad_()
                for x in tensors(head_dim, dtype, 5, vsa.Grid(GRID).length)
            ]
            out = vsa.attention(
                *given[:3],
                KEPT,
                grid=GRID,
                gate_coarse=given[3],
                gate_fine=given[4],
                score=score,
                backend=backend,
            )
            out.float().sum().backward()
            for x in (out, *(x.grad for x in given)):
                if not torch.isfinite(x).all():
                    raise SystemExit(f"sanitize.py: not finite in {head_dim} {dtype} {score}")


def drop_ins() -> None:
    """The operators of other packages: padded tiles with sizes, and lists of them."""
    tiles = 7
    sizes = torch.tensor([64, 1, 17, 64, 40, 8, 63], dtype=torch.int32)
    real = (torch.arange(64) < sizes[:, None]).flatten()[None, None, :, None]
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(1, HEADS, tiles, tiles, generator=generator).argsort(-1).int()
    counts = torch.randint(1, tiles, (1, HEADS, tiles), generator=generator).int()
    for head_dim, dtype in each_kind():
        given = [
            (x.transpose(1, 2) * real).contiguous() for x in tensors(head_dim, dtype, 3, 64 * tiles)
        ]

        def lists(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
            at = [x.to(q.device) for x in (order, counts, sizes)]
            return vsa.block_sparse_attn_from_indices(q, k, v, *at, backend=backend)[0]

        def operator(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
            at = sizes.to(q.device)
            return vsa.video_sparse_attn(q, k, v, at, at, tiles, (4, 4, 4), backend=backend)

        for call in (lists, operator):
            compare(f"{call.__name__} {head_dim} {dtype}", call, given, NEAR, backward=True)


PARTS = {each.__name__: each for each in (native, low_precision, tail, whole_calls, drop_ins)}


def command(tool: str, part: str) -> list[str]:
    """A part under a tool."""
    of_ours = [] if tool == "initcheck" else ["--kernel-regex", "kns=vsa"]
    given = ["--tool", tool, *of_ours, "--error-exitcode", str(FOUND)]
    return ["compute-sanitizer", *given, sys.executable, __file__, "--run", part]


def under(tool: str, part: str, limit: float) -> bool:
    """Whether a part is right and its tool finds nothing."""
    begin = time.monotonic()
    try:
        done = subprocess.run(command(tool, part), capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        print(f"{tool} {part}: not done within {limit:.0f} s", flush=True)
        return False
    took = time.monotonic() - begin
    silent = done.returncode == 0
    print(f"{tool} {part}: {'silent' if silent else 'FAILED'}, {took:.0f} s", flush=True)
    if not silent:
        print("\n".join((done.stdout + done.stderr).splitlines()[:60]), flush=True)
    return silent


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tool", nargs="+", default=TOOLS[:2], choices=TOOLS)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--minutes", type=float, default=5.0, help="that a part may take")
    parser.add_argument("--run", choices=list(PARTS), metavar="NAME", help="one of the parts")
    given = parser.parse_args()
    if given.run:
        PARTS[given.run]()
        return
    if not torch.cuda.is_available():
        parser.error("compute-sanitizer needs a GPU, and PyTorch finds none here; --run does not")
    silent = [under(tool, part, given.minutes * 60) for tool in given.tool for part in given.parts]
    sys.exit(not all(silent))


if __name__ == "__main__":
    main()
