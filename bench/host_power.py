# SPDX-License-Identifier: Apache-2.0
"""Fine kernels over padded tiles, rested and hot: by layout, beside raster order and FastVideo's.

usage: python bench/host_power.py [--folder FOLDER] [--out FILE] [--commit HASH]
       ncu --set full -k regex:FineForward --launch-skip 1 --launch-count 1
       python bench/host_power.py --once "padded"

The same video attended in raster order and in padded tiles, with heads inside of tokens or
outermost, with its sizes or with whole tiles, and lists as in ``bench/host_layers.py``, whose
FOLDER this is; without it FastVideo's rows are left out. "Chosen" are the lists that the operator
chooses, given: with its sizes, with whole tiles, with sizes that other tiles have, with all tiles
elsewhere in memory, and with lists that keep as many padded tiles, but none more often than others.
Each call is first timed after a rest, then all by turns after a third of a second of it: the clock
and the power are means of nvidia-smi's samples in that time. Times are of the longest kernel of a
call, which is the fine stage, by PyTorch's profiler.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import torch
from torch import Tensor

import vsa
from host_kernels import kernels_of_calls
from host_layers import SLOTS, TILE, Layer, loaded, shape_of, theirs
from vsa.measure.provenance import provenance, write
from vsa.measure.shapes import SHAPES

SHAPE = "wan-1.3b-480p"
TURNS, HEATED, REST = 4, 0.35, 0.7
"""Turns of all calls, seconds of a call before it is profiled in each, and seconds of rest."""
ASKED = "clocks.sm,power.draw.instant,temperature.gpu,clocks_event_reasons.active"


class Samples:
    """Clock, power and temperature of the GPU, several times in each hundredth of a second."""

    def __init__(self) -> None:
        command = ["nvidia-smi", f"--query-gpu={ASKED}", "--format=csv,noheader,nounits", "-lms=20"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._lines: list[tuple[float, list[str]]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append((time.time(), line.strip().split(", ")))

    def since(self, begin: float) -> dict[str, float]:
        """Means from a moment on."""
        lines = [each for when, each in self._lines if when >= begin and len(each) == 4]
        if not lines:
            return {}
        names = "clock MHz", "power W", "temperature C"
        found = {name: statistics.mean(float(x[i]) for x in lines) for i, name in enumerate(names)}
        return found | {"power-capped": sum(int(x[3], 16) & 4 != 0 for x in lines) / len(lines)}

    def stop(self) -> None:
        """No more."""
        self._process.terminate()


def calls_of(layer: Layer, kernel: Any) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    grid, kept, sizes = layer.grid, layer.kept, layer.sizes
    raster, padded = layer.tokens, layer.padded()
    outermost, inside = (
        [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given]
        for given in (raster, padded)
    )
    whole = torch.full_like(sizes, SLOTS)
    tokens, *lists = layer.lists()
    chosen = vsa.select(*raster[:2], kept, grid=grid).mask()
    elsewhere = torch.randperm(grid.num_tiles, device=sizes.device)
    moved = [_moved(x, elsewhere) for x in padded[:3]]

    def in_raster(x: list[Tensor]) -> Callable[[], object]:
        return lambda: vsa.attention(*x[:3], kept, grid=grid, gate_coarse=x[3])

    def in_tiles(x: list[Tensor], of: Tensor, call: Any = None) -> Callable[[], object]:
        given = *x[:3], of, of, kept, TILE, x[3]
        return lambda: (call or vsa.video_sparse_attn)(*given)

    def given(x: list[Tensor], mask: Tensor, of: Tensor) -> Callable[[], object]:
        found = as_lists(mask)
        return lambda: vsa.block_sparse_attn_from_indices(*x[:3], *found, of)

    calls = {
        "raster": in_raster(raster),
        "raster, heads outermost": in_raster(outermost),
        "padded": in_tiles(padded, sizes),
        "padded, heads inside": in_tiles(inside, sizes),
        "padded, whole tiles": in_tiles(padded, whole),
        "chosen": given(padded, chosen, sizes),
        "chosen, whole tiles": given(padded, chosen, whole),
        "chosen, other tiles padded": given(padded, chosen, sizes[elsewhere]),
        "chosen, tiles elsewhere": given(
            moved, chosen[..., elsewhere, :][..., elsewhere], sizes[elsewhere]
        ),
        "as many padded": given(padded, as_many_padded(chosen, sizes), sizes),
        "lists": lambda: vsa.block_sparse_attn_from_indices(*tokens, *lists),
    }
    if kernel is not None:
        own, other = (
            theirs(False, getattr(kernel, name))
            for name in ("video_sparse_attn", "block_sparse_attn_from_indices")
        )
        calls["padded, FastVideo"] = in_tiles(padded, sizes, own)
        calls["lists, FastVideo"] = lambda: other(*tokens, *lists)
    return calls


def _moved(x: Tensor, to: Tensor) -> Tensor:
    """Tokens (B, heads, slots, head_dim) with its tiles in another order."""
    return x.unflatten(2, (-1, SLOTS))[:, :, to].flatten(2, 3)


def as_lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Lists and counts of a mask (B, heads, tiles, tiles)."""
    return (~mask).int().argsort(dim=-1, stable=True).int(), mask.sum(-1).int()


def as_many_padded(mask: Tensor, sizes: Tensor) -> Tensor:
    """A mask whose rows keep as many padded tiles and as many whole ones, drawn at random."""
    found = torch.zeros_like(mask)
    for padded in (sizes < SLOTS, sizes == SLOTS):
        drawn = torch.rand(mask.shape, device=mask.device).masked_fill(~padded, 2)
        found |= drawn.argsort(-1).argsort(-1) < (mask & padded).sum(-1, keepdim=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="host_power.py", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="with the unpacked wheels")
    parser.add_argument("--once", metavar="CALL", help="two of it alone, for a profiler")
    parser.add_argument("--commit", help="of the sources, where they are no clone")
    parser.add_argument("--out", type=Path, help="write rows to this .json file")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a GPU's clock and power are what is measured here")
    device = torch.device("cuda")
    command = ["bench/host_power.py", *sys.argv[1:]]
    about = provenance(device, command=command, commit=given.commit)
    kernel = loaded(given.folder) if given.folder else None
    calls = calls_of(Layer(*shape_of(SHAPES[SHAPE]), "cuda"), kernel)
    if given.once:
        if given.once not in calls:
            parser.error(f"--once must be one of {', '.join(calls)}, but it is {given.once}")
        for _ in range(2):
            calls[given.once]()
        return
    samples, rows = Samples(), []
    with torch.no_grad():
        for call in calls.values():
            call()
        for name, call in calls.items():
            torch.cuda.synchronize()
            time.sleep(REST)
            rows.append({"call": name, "rested us": longest(call, device, 5)[0]})
        found: dict[str, list[dict[str, float]]] = defaultdict(list)
        for _ in range(TURNS):
            for name, call in calls.items():
                end = time.time() + HEATED
                while time.time() < end:
                    for _ in range(10):
                        call()
                    torch.cuda.synchronize()
                begin = time.time() - HEATED / 2
                fine, busy = longest(call, device, 10)
                found[name].append({"hot us": fine, "all kernels us": busy} | samples.since(begin))
    samples.stop()
    for row in rows:
        of_call = found[row["call"]][1:]
        for key in of_call[0]:
            row[key] = statistics.mean(each[key] for each in of_call if key in each)
        print({key: round(x, 2) if isinstance(x, float) else x for key, x in row.items()})
    write(given.out, about, rows)


def longest(call: Callable[[], object], device: torch.device, calls: int) -> tuple[float, float]:
    """Microseconds of the longest kernel of a call, and of all."""
    times = [time for time, _ in kernels_of_calls(call, device, calls)[0].values()]
    return max(times), sum(times)


if __name__ == "__main__":
    main()
