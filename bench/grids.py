# SPDX-License-Identifier: Apache-2.0
"""Parity of the fine stage with fp64 on the token grids of real models, on sampled tiles.

usage: python bench/grids.py [--backward] [--only SUBSTRING] [--tiny] [--out results.json]

Sampled query tiles (the last, one clipped along each axis, the first, random ones) and all valid
text in runs of 64 are compared one by one, each over the tokens of its key tiles and the valid
text. Numbers are `vsa.verify.parity.error` as multiples of a yardstick's error, the worst of all;
at most 2 passes. No yardstick counts for less than rounding the true result once.

out     PyTorch's SDPA (flash attention where it runs) in the same type on the same tokens
dq      autograd through that SDPA with the same upstream gradient
dk, dv  of three key tiles and all text, over all queries that attend them: the same sums in fp32,
        where only P and dS before their products, and the out that delta = sum(dO out) is made of,
        are rounded to the type, as in flash attention; 2 * max(this error, rounding) is allowed
lse     |difference| / (1e-5 + 1e-5 |lse|), of which at most 1 passes

Besides, text that is padding must come out as exact zeros (lse: -inf), and a second forward call
must give the same bits. Exit status 1 if any case fails.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import vsa
from vsa.cli.options import machine
from vsa.measure.shapes import SHAPES
from vsa.verify.fp64_sample import Exact
from vsa.verify.parity import error

HEADS, TOPK = 2, 0.125
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LIMITS = {"out": 2.0, "lse": 1.0, "dq": 2.0, "dk": 2.0, "dv": 2.0}
GRIDS = {
    "wan2.1-480p": SHAPES["wan-1.3b-480p"].grid,
    "wan-720p": SHAPES["wan-1.3b-720p"].grid,
    "wan2.2-5b": vsa.Grid((31, 22, 40)),
    "fastvideo-448x832x77": vsa.Grid((20, 28, 52)),
    "fastwan-448x832x61": vsa.Grid((16, 28, 52)),
    "fastvideo-768x1280x77": vsa.Grid((20, 48, 80)),
    "hunyuan-720p": SHAPES["hunyuan-720p"].grid,
    "hunyuan-544p": SHAPES["hunyuan-544p"].grid,
    "hunyuan1.5-720p": vsa.Grid((31, 45, 80)),
    "hunyuan1.5-480p": vsa.Grid((31, 30, 53)),
    "cogvideox": SHAPES["cogvideox-2b"].grid,
    "cogvideox1.5": SHAPES["cogvideox1.5-5b"].grid,
    "ltx-video": SHAPES["ltx-video"].grid,
    "ltx-2": vsa.Grid((16, 16, 24)),
    "mochi-163f": vsa.Grid((28, 30, 53)),
    "mochi-85f": vsa.Grid((15, 30, 53)),
}
PADDED = {"hunyuan-720p", "hunyuan-544p"}  # their text is filled up to 256; here 60 % is real
ONE_KEY_HEAD = {"wan2.2-5b", "hunyuan-544p", "mochi-85f"}  # not the models' own, to have some


def tiny(grid: vsa.Grid) -> vsa.Grid:
    """About a quarter of it along each axis, with the same remainders by 4."""
    sizes = (*grid.shape, grid.prefix, grid.suffix)
    t, h, w, *text = (n and 4 * max(1, n // 16) + n % 4 for n in sizes)
    return vsa.Grid((t, h, w), grid.tile, *text)


def sampled(grid: vsa.Grid, count: int) -> list[int]:
    """The last tile, a random one, one clipped along each axis, the first, more random ones."""
    n = grid.num_tiles
    others = random.Random(0).sample(range(n), n)
    ragged = [axis for axis in range(3) if grid.shape[axis] % grid.box[axis]]
    index = torch.arange(n).view(grid.tiles)
    clipped = (random.Random(1).choice(index.select(x, -1).flatten().tolist()) for x in ragged)
    return list(dict.fromkeys([n - 1, others[0], *clipped, 0, *others]))[:count]


def compare(exact: Exact, found: dict[str, Tensor], groups: list[int]) -> dict[str, float]:
    """The worst multiple of every result; found by name, (heads, S, D) or lse (heads, S)."""
    multiples: dict[str, list[float]] = {name: [] for name in LIMITS if name in found}

    def note(names: str, at: tuple[int, Tensor], *results: tuple[Tensor, Tensor]) -> None:
        for name, truth, yardstick in zip(names.split(), *results, strict=True):
            if name in found:
                x = found[name][at]
                allowed = max(error(yardstick, truth), error(truth.to(x.dtype), truth), 1e-30)
                multiples[name].append(error(x, truth) / allowed)

    for head, group in product(range(HEADS), groups):
        for at in ((head, run) for run in exact.members(group).split(64)):
            note("out dq", at, exact.forward(*at), exact.sdpa(*at))
            off = (found["lse"][at] - exact.lse[at]).abs() / (1e-5 + 1e-5 * exact.lse[at].abs())
            multiples["lse"].append(off.max().item())
    chosen = dict.fromkeys(groups[:3] + groups[-1:]) if "dk" in found else ()
    for at in ((head, exact.members(j)) for head in range(len(exact.k)) for j in chosen):
        note("dk dv", at, *(exact.key_gradients(*at, rounded) for rounded in (False, True)))
    return {name: torch.tensor(x).max().item() for name, x in multiples.items()}  # NaN stays NaN


def run(name: str, grid: vsa.Grid, head_dim: int, dtype: str, options: Any) -> dict[str, Any]:
    """One case, from random tensors to a verdict."""
    start, kv_heads = time.perf_counter(), 1 if name in ONE_KEY_HEAD else HEADS
    make = {"generator": torch.Generator(options.device).manual_seed(0), "device": options.device}
    q, k, v, upstream = (
        (magnitude * torch.randn(1, grid.length, heads, head_dim, **make)).to(DTYPES[dtype])
        for heads, magnitude in ((HEADS, 2), (kv_heads, 1), (kv_heads, 1), (HEADS, 1))
    )
    place = torch.arange(grid.text, device=q.device)[None]
    valid = place < 0.6 * grid.text if name in PADDED else None
    selection = vsa.select(q, k, TOPK, grid=grid)
    leaves = [x.clone().requires_grad_(options.backward) for x in (q, k, v)]
    call = {"text_valid": valid, "return_lse": True, "backend": options.backend}
    out, lse = vsa.block_sparse_attention(*leaves, selection, **call)
    again = vsa.block_sparse_attention(*leaves, selection, **call)
    found = {"lse": lse[0].detach(), "out": out[0].detach().transpose(0, 1)}
    if options.backward:
        grads = torch.autograd.grad(out, leaves, upstream)
        found |= {f"d{x}": d[0].transpose(0, 1) for x, d in zip("qkv", grads, strict=True)}
    exact = Exact(grid, selection.mask()[0], valid, q, k, v, upstream)
    groups = sampled(grid, options.tiles) + [grid.num_tiles] * bool(grid.text)
    multiples = compare(exact, found, groups)
    passed = {x: multiples[x] <= LIMITS[x] for x in multiples}
    passed["same bits"] = torch.equal(out, again[0]) and torch.equal(lse, again[1])
    idle, nothing = exact.members(grid.num_tiles + 1), {"lse": -torch.inf}
    for x, result in found.items():
        passed[f"padding of {x}"] = bool((result[:, idle] == nothing.get(x, 0)).all())
    failed, seconds = [x for x in passed if not passed[x]], time.perf_counter() - start
    numbers = ", ".join(f"{x} {multiple:.2f}" for x, multiple in multiples.items())
    verdict = f"FAILED: {', '.join(failed)}" if failed else "ok"
    print(f"{name:21s} d{head_dim:<3d} {dtype}: {numbers}, {seconds:.1f} s: {verdict}", flush=True)
    row = {"name": name, **asdict(grid), "kv_heads": kv_heads, "head_dim": head_dim, "dtype": dtype}
    return row | multiples | {"failed": failed, "seconds": seconds}


def main() -> None:
    """Check every case, print a line each and a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", help="by default hopper, on a CPU emulated")
    parser.add_argument("--device", type=torch.device, help="by default a GPU; with --tiny a CPU")
    parser.add_argument("--backward", action="store_true", help="check the gradients too")
    parser.add_argument("--only", default="", help="grids whose name contains this")
    parser.add_argument("--tiles", type=int, default=24, help="sampled query tiles of a grid")
    parser.add_argument("--tiny", action="store_true", help="a quarter along each axis")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.device = options.device or torch.device("cpu" if options.tiny else "cuda")
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA GPU is visible: --tiny takes small grids, on the emulator by default")
    kernels = "emulated" if options.device.type == "cpu" else "hopper"
    options.backend = options.backend or kernels
    grids = {x: tiny(y) if options.tiny else y for x, y in GRIDS.items() if options.only in x}
    if not grids:
        parser.error(f"--only {options.only}: no such grid among {', '.join(GRIDS)}")
    names = [name for name in LIMITS if options.backward or not name.startswith("d")]
    table = Table("grid", "tokens", "text", "passed", *names)
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "vsa": vsa.__version__}
    facts = {"device": machine(options.device), **versions, "options": str(options)}
    rows: list[dict[str, Any]] = []
    for name, grid in grids.items():
        rows += (mine := [run(name, grid, *case, options) for case in product((64, 128), DTYPES)])
        worst = torch.tensor([[row[x] for x in names] for row in mine]).amax(0)
        passed = f"{sum(not row['failed'] for row in mine)}/{len(mine)}"
        shape = "x".join(map(str, grid.shape)), f"{grid.prefix}+{grid.suffix}"
        table.add_row(name, *shape, passed, *(f"{x:.2f}" for x in worst))
        if options.out:
            options.out.write_text(json.dumps(facts | {"rows": rows}, indent=1))
    Console().print(table)
    sys.exit(any(row["failed"] for row in rows))


if __name__ == "__main__":
    main()
