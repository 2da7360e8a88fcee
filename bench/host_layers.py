# SPDX-License-Identifier: Apache-2.0
"""What FastVideo's users gain: its operator, its layer and its lists, on its kernels and on ours.

usage: python bench/host_layers.py --folder FOLDER [--shapes LIST] [--what LIST] [--kernels]
                                    [--out FILE] [--commit HASH]
       python bench/host_layers.py --tiny --folder FOLDER

FOLDER has fastvideo-0.2.1 and fastvideo_kernel-0.3.2, unpacked wheels (``unzip -d``): the newest
whose Hopper kernels load beside any PyTorch. Rows are

operator  ``video_sparse_attn`` on padded tiles of 4x4x4 with a gate, means and choice included
layer     FastVideo's DistributedAttention_VSA on raster tokens, one rank: its own gathers and
          operator, and after ``vsa.integrations.fastvideo.install()``
lists     ``block_sparse_attn_from_indices`` as VSA-H3 asks for it: 70 tokens of a prefix kept by
          all and dense for its own queries, other rows with counts that differ

FastVideo's kernels are those that it takes on Hopper (ThunderKittens), and its Triton ones, which
it takes where that extension cannot be loaded. Calls are timed by turns, so that all meet the same
clock. Before that, outputs are held to each other on real tokens, with all tiles kept where a call
chooses: FastVideo scores in bf16 and we in fp32, so that near ties are chosen otherwise.
``--kernels`` adds what each kernel of each call takes, what lies between them, and the host's time.
``--tiny`` runs our rows alone, on a CPU.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import torch
from hosts import loose
from hosts.run_fastvideo import BASE, REAL, make_ready
from torch import Tensor

import vsa
from comparison.sparse import link_driver
from host_kernels import kernels_of
from vsa.integrations.fastvideo import install, uninstall
from vsa.measure.provenance import provenance, write
from vsa.measure.shapes import SHAPES
from vsa.measure.timing import seconds, settled

SHARE, TILE, SLOTS = 0.125, (4, 4, 4), 64
PREFIX = 70
ROUNDS = 7
"""Of timings of all calls; medians count."""
NEAR = 0.01
"""Largest difference of two outputs in bf16, as a share of the norm."""
Calls = dict[str, Callable[[], Tensor]]


class Layer:
    """Inputs of a layer: raster tokens, the same in padded tiles, and lists."""

    def __init__(self, shape: tuple[int, int, int], heads: int, head_dim: int, device: str) -> None:
        self.grid, self.device = vsa.Grid(shape, tile=TILE), device
        size = 4, 1, self.grid.tokens, heads, head_dim
        self.tokens = list(torch.randn(size, device=device).bfloat16().unbind())
        self.sizes = self.grid.sizes.to(device, torch.int32)
        tiles = self.grid.tile_of_token()
        order = torch.argsort(tiles, stable=True)
        first = torch.cumsum(self.grid.sizes, 0) - self.grid.sizes
        slots = torch.empty_like(order)
        slots[order] = tiles[order] * SLOTS + torch.arange(len(order)) - first[tiles[order]]
        self.slots = slots.to(device)
        self.kept = max(1, -(-self.grid.num_tiles // int(1 / SHARE)))
        self.budgets = self.grid.num_tiles, self.kept

    def padded(self) -> list[Tensor]:
        """q, k, v and the gate as (B, heads, slots, head_dim), zeros in padding."""
        found = []
        for x in self.tokens:
            tiled = x.new_zeros(1, SLOTS * self.grid.num_tiles, *x.shape[2:])
            tiled[:, self.slots] = x
            found.append(tiled.transpose(1, 2).contiguous())
        return found

    def lists(self) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """q, k and v behind a prefix, lists, counts and sizes."""
        heads, head_dim = self.tokens[0].shape[2:]
        before, video = -(-PREFIX // SLOTS), self.grid.num_tiles
        tiles = before + video
        sizes = torch.cat(
            (torch.tensor([SLOTS, PREFIX - SLOTS], dtype=torch.int32), self.sizes.cpu())
        )
        real = torch.arange(SLOTS) < sizes[:, None]
        shape = 3, 1, heads, tiles * SLOTS, head_dim
        x = torch.randn(shape) * real.flatten()[:, None]
        kept = torch.rand(heads, tiles, tiles).argsort(-1).argsort(-1)
        counts = self.kept + torch.randint(-(self.kept // 2), self.kept // 2 + 1, (heads, tiles, 1))
        chosen = kept < counts
        chosen[..., :before] = True
        chosen[:, :before] = True
        lists = (~chosen).int().argsort(dim=-1, stable=True).int()
        given = lists[None], chosen.sum(-1)[None].int(), sizes
        tokens = list(x.bfloat16().to(self.device).unbind())
        return tokens, *(each.to(self.device).contiguous() for each in given)


def theirs(triton: bool, call: Callable[..., Any]) -> Callable[..., Any]:
    """A call of FastVideo's with its environment variable for its Triton kernels set, or not."""

    def run(*given: Any, **options: Any) -> Any:
        os.environ["FASTVIDEO_VSA_TRITON"] = str(int(triton))
        return call(*given, **options)

    return run


def operator_calls(layer: Layer, kernel: Any, leaves: list[Tensor], kept: int) -> Calls:
    """``video_sparse_attn`` in the call form of FastVideo."""
    given = *leaves[:3], layer.sizes, layer.sizes, kept, TILE, leaves[3]
    calls: Calls = {"ours": lambda: vsa.video_sparse_attn(*given)}
    if kernel is not None:
        for name, triton in (("theirs", False), ("theirs, Triton", True)):
            call = theirs(triton, kernel.video_sparse_attn)
            calls[name] = lambda call=call: call(*given)
    return calls


def list_calls(layer: Layer, kernel: Any) -> tuple[Calls, list[Tensor], Tensor]:
    """``block_sparse_attn_from_indices``."""
    tokens, *given = layer.lists()
    leaves = [x.requires_grad_() for x in tokens]
    calls: Calls = {"ours": lambda: vsa.block_sparse_attn_from_indices(*leaves, *given)[0]}
    if kernel is not None:
        for name, triton in (("theirs", False), ("theirs, Triton", True)):
            call = theirs(triton, kernel.block_sparse_attn_from_indices)
            calls[name] = lambda call=call: call(*leaves, *given)[0]
    real = torch.arange(SLOTS, device=layer.device) < given[2][:, None]
    return calls, leaves, real.flatten()


def layer_calls(layer: Layer, leaves: list[Tensor], kept: int, context: Any) -> Calls:
    """FastVideo's own layer, as it is and after ``install``.

    Args:
        layer: whose grid counts.
        leaves: q, k, v and the gate in raster order.
        kept: tiles.
        context: that the layer reads its metadata from, one for the process.
    """
    module = importlib.import_module(f"{BASE}.backends.video_sparse_attn")
    made = importlib.import_module(f"{BASE}.layer").DistributedAttention_VSA
    _, _, heads, head_dim = leaves[0].shape
    t, h, w = layer.grid.shape
    metadata = module.VideoSparseAttentionMetadataBuilder().build(
        current_timestep=0,
        raw_latent_shape=(t, 2 * h, 2 * w),
        patch_size=(1, 2, 2),
        VSA_sparsity=1 - kept / layer.grid.num_tiles,
        device=torch.device(layer.device),
        cache_tile_buf=False,  # as in training: a buffer that is used again has no gradient
    )
    q, k, v, gate = leaves

    def call(attention: Any, triton: bool = False) -> Callable[[], Tensor]:
        run = theirs(triton, attention)

        def within() -> Tensor:
            context.attn_metadata = metadata
            return run(q, k, v, q.shape[1], gate_compress=gate)[0]

        return within

    own = made(num_heads=heads, head_size=head_dim)
    calls = {"theirs": call(own), "theirs, Triton": call(own, triton=True)}
    install()
    try:
        calls["ours"] = call(made(num_heads=heads, head_size=head_dim))
    finally:
        uninstall()
    return calls


def distances(calls: Calls, real: Tensor | slice) -> dict[str, float]:
    """Of all outputs from ours on real tokens, as shares of its norm.

    Raises:
        SystemExit: with a sentence, if one is too large for times to mean anything.
    """
    with torch.no_grad():
        outs = {name: call()[..., real, :].float() for name, call in calls.items()}
    own = outs.pop("ours")
    found = {name: ((out - own).norm() / own.norm()).item() for name, out in outs.items()}
    for name, off in found.items():
        if not off <= NEAR:
            raise SystemExit(f"host_layers.py: {name} is {off:.1e} from ours, more than {NEAR}")
    return found


def directed(calls: Calls, leaves: list[Tensor], backward: bool) -> dict[str, Callable[[], object]]:
    """The calls in one direction or with their gradients."""
    upstream = torch.randn_like(calls["ours"]().detach())

    def whole(call: Callable[[], Tensor]) -> Callable[[], object]:
        def run() -> object:
            with torch.set_grad_enabled(backward):
                out = call()
            return torch.autograd.grad(out, leaves, upstream) if backward else out

        return run

    return {name: whole(call) for name, call in calls.items()}


def timed(calls: Calls, leaves: list[Tensor], backward: bool, device: torch.device) -> dict:
    """Milliseconds of all calls, by turns."""
    runs = directed(calls, leaves, backward)
    counts = {name: settled(run, device) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS if device.type == "cuda" else 1):
        for name, run in runs.items():
            times[name] += seconds(run, device, 1, counts[name])
    return {f"{name} ms": statistics.median(found) * 1e3 for name, found in times.items()}


def loaded(folder: Path) -> Any:
    """FastVideo's kernels, with this machine's driver where their wheel has one of its own."""
    root = (folder / "fastvideo_kernel-0.3.2").resolve()
    (extension,) = (root / "fastvideo_kernel" / "_C").glob("fastvideo_kernel_ops*.so")
    link_driver(extension, root / "fastvideo_kernel.libs")
    sys.path.insert(0, str(root))
    kernel = importlib.import_module("fastvideo_kernel")
    # Who imports it inside would not notice: FastVideo goes over to Triton without a word.
    importlib.import_module("fastvideo_kernel._C.fastvideo_kernel_ops")
    return kernel


def measured(
    layer: Layer, folder: Path, tiny: bool, parts: list[str], by_kernel: bool
) -> Iterator[dict[str, Any]]:
    """A row for each of operator, layer and lists, as asked for, in each direction."""
    device = torch.device(layer.device)
    kernel = None if tiny else loaded(folder)
    padded = [x.requires_grad_() for x in layer.padded()]
    raster = [x.requires_grad_() for x in layer.tokens]
    every: slice = slice(None)
    context = SimpleNamespace(attn_metadata=None)
    with loose.Only(folder / "fastvideo-0.2.1", {"fastvideo"}, REAL):
        make_ready(context)
        for what in parts:
            if what == "operator":
                used, real = padded, layer.slots
                made = [operator_calls(layer, kernel, used, kept) for kept in layer.budgets]
            elif what == "layer":
                used, real = raster, every
                made = [layer_calls(layer, used, kept, context) for kept in layer.budgets]
            else:
                calls, used, real = list_calls(layer, kernel)
                made = [calls, calls]
            off = distances(made[0], real)
            for backward in (False, True):
                row: dict[str, Any] = {"what": what}
                row["direction"] = "forward+backward" if backward else "forward"
                row |= {f"{name} from ours": each for name, each in off.items()}
                row |= timed(made[1], used, backward, device)
                row |= {f"{name} / ours": row[f"{name} ms"] / row["ours ms"] for name in off}
                if by_kernel:
                    runs = directed(made[1], used, backward)
                    row["by kernel"] = {name: kernels_of(run, device) for name, run in runs.items()}
                yield row


def main() -> None:
    parser = argparse.ArgumentParser(prog="host_layers.py", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="with the unpacked wheels")
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=["wan-1.3b-480p"])
    every = ["operator", "lists", "layer"]
    parser.add_argument("--what", type=lambda text: text.split(","), default=every)
    parser.add_argument("--kernels", action="store_true", help="what each kernel takes, too")
    parser.add_argument("--tiny", action="store_true", help="our rows of a small layer, on a CPU")
    parser.add_argument("--commit", help="of the sources, where they are no clone")
    parser.add_argument("--out", type=Path, help="write rows to this .json file")
    given = parser.parse_args()
    device = "cpu" if given.tiny else "cuda"
    if not given.tiny and not torch.cuda.is_available():
        parser.error("the kernels are timed on a Hopper GPU: pass --tiny to see that it runs")
    about = provenance(
        torch.device(device), command=["bench/host_layers.py", *sys.argv[1:]], commit=given.commit
    )
    if unknown := {*given.what} - {*every}:
        parser.error(f"--what takes {', '.join(every)}, but it was {', '.join(unknown)}")
    parts = [what for what in given.what if not given.tiny or what != "layer"]
    rows = []
    for name in ["tiny"] if given.tiny else given.shapes:
        of = SHAPES.get(name)
        layer = Layer((5, 6, 7), 2, 64, device) if of is None else Layer(*shape_of(of), device)
        for row in measured(layer, given.folder, given.tiny, parts, given.kernels):
            rows.append({"shape": name, **row})
            write(given.out, about, rows, complete=False)
            of_kernels = row.pop("by kernel", {})
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
            for who, found in of_kernels.items():
                print_kernels(who, found)
    write(given.out, about, rows)


def print_kernels(who: str, found: dict[str, Any]) -> None:
    """A call's kernels, the longest first."""
    sums = ", ".join(f"{name} {found[name]:.1f}" for name in found if name != "kernels")
    print(f"  {who}: {sums}")
    for name, (time, launches) in found["kernels"].items():
        print(f"    {time:9.1f} us {launches:6.1f} x  {name}")


def shape_of(layer: Any) -> tuple[tuple[int, int, int], int, int]:
    """Grid, heads and head_dim of a layer of ``vsa.measure.shapes``."""
    return layer.grid.shape, layer.heads, layer.head_dim


if __name__ == "__main__":
    main()
