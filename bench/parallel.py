# SPDX-License-Identifier: Apache-2.0
"""Ulysses on several GPUs: parity with one process, and the time of one GPU, all, and exchanges.

usage: python bench/parallel.py [--ranks 2] [--shape wan-1.3b-480p] [--out parallel.json]

Starts a process for each GPU of this machine. In every case each rank also computes the whole layer
alone and compares its share of the output and of the gradients, on the selection of one process;
the command fails where they differ by more than --tolerance. ``--device cpu`` does the same with
gloo and a tiny layer, to see that the script works; its times mean nothing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import start_processes

import vsa
from vsa.distributed import ulysses_attention
from vsa.distributed.exchange import to_heads, to_tokens
from vsa.measure.provenance import provenance, write
from vsa.measure.shapes import SHAPES, Shape
from vsa.measure.timing import seconds, spread

TINY = Shape(vsa.Grid((5, 6, 7)), 4, 32)
CASES = (("even", False), ("even", True), ("uneven", True))
"""How the sequence is shared out, and whether there is a coarse gate per token."""
WORST = "worst"
"""The file in which the command finds the largest error."""


@dataclass(frozen=True)
class Parity:
    """How far the ranks are from one process, the worst of them.

    Attributes:
        case: which case.
        chosen: share of the query tiles that keep other key tiles; ties and rounding may do that.
        errors: distance from one process as a share of its norm, of out and of every gradient.
    """

    case: str
    chosen: float
    errors: dict[str, float]


@dataclass(frozen=True)
class Row:
    """One timed call, the slowest rank's.

    Attributes:
        case: which case.
        what: what is called.
        ranks: how many GPUs work on it together.
        ms: median time.
        spread: half the distance between the quartiles, as a share of the median.
        sent: bytes that a rank gives to others, 0 where nothing is exchanged.
    """

    case: str
    what: str
    ranks: int
    ms: float
    spread: float
    sent: int = 0


def shares(length: int, ranks: int, kind: str) -> list[int]:
    """Tokens of every rank; uneven ones take an eighth, and one token, from the last to the first.

    Args:
        length: of the whole sequence.
        ranks: how many.
        kind: "even" or "uneven".
    """
    counts = [length // ranks + (rank < length % ranks) for rank in range(ranks)]
    moved = counts[-1] // 8 + 1 if kind == "uneven" else 0
    counts[0] += moved
    counts[-1] -= moved
    return counts


class Case:
    """One layer on all ranks, and the same layer whole on each of them."""

    def __init__(self, kind: str, gated: bool, layer: Shape, options: argparse.Namespace) -> None:
        self.name = f"{kind} shares, {'a coarse gate' if gated else 'no gate'}"
        self.ranks, self.rank = dist.get_world_size(), dist.get_rank()
        self.repeats = options.repeats
        self.lengths = shares(layer.grid.length, self.ranks, kind)
        dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
        size = 4 + gated, 1, layer.grid.length, layer.heads, layer.head_dim
        torch.manual_seed(0)
        made = torch.randn(size, device=options.device, dtype=dtype)
        dist.broadcast(made, 0)
        self.upstream, *whole = made.unbind()
        self.names = ["q", "k", "v", "gate_coarse"][: len(whole)]
        self.whole = [x.detach().requires_grad_() for x in whole]
        self.mine = [self.share(x).detach().clone().requires_grad_() for x in whole]
        self.settings = {"topk": options.share, "grid": layer.grid}

    def share(self, x: Tensor) -> Tensor:
        """This rank's tokens of a whole sequence, (B, S, ...)."""
        return x.split(self.lengths, dim=1)[self.rank]

    def alone(self, **settings: Any) -> Any:
        """The whole layer on this GPU."""
        q, k, v, *gate = self.whole
        own = dict(zip(("gate_coarse",), gate, strict=False))
        return vsa.attention(q, k, v, **self.settings | own | settings)

    def together(self, **settings: Any) -> Any:
        """This rank's part of the layer on all of them."""
        q, k, v, *gate = self.mine
        own = dict(zip(("gate_coarse",), gate, strict=False))
        return ulysses_attention(q, k, v, lengths=self.lengths, **self.settings | own | settings)

    def parity(self) -> Parity:
        """Compare with one process, gradients included."""
        out, chosen = self.alone(return_selection=True)
        heads = out.shape[2] // self.ranks
        bitmap = chosen.bitmap[:, self.rank * heads : (self.rank + 1) * heads]
        with torch.no_grad():
            _, own = self.together(return_selection=True)
        differing = (own.bitmap != bitmap).any(-1).float().mean()
        same = replace(chosen, bitmap=bitmap.contiguous())
        part = self.together(topk=None, selection=same)
        wanted = [out, *torch.autograd.grad(out, self.whole, self.upstream)]
        found = [part, *torch.autograd.grad(part, self.mine, self.share(self.upstream))]
        errors = [_distance(a, self.share(b)) for a, b in zip(found, wanted, strict=True)]
        worst = torch.stack([differing.double(), *errors])
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        share, *each = worst.tolist()
        return Parity(self.name, share, dict(zip(("out", *self.names), each, strict=True)))

    def rows(self) -> Iterator[Row]:
        """Time one GPU, all of them, and what they exchange."""
        for ranks, attend, leaves, upstream in (
            (1, self.alone, self.whole, self.upstream),
            (self.ranks, self.together, self.mine, self.share(self.upstream)),
        ):
            with torch.no_grad():
                yield self.timed("forward", ranks, attend)
            out = attend()
            yield self.timed(
                "backward",
                ranks,
                lambda o=out, x=leaves, u=upstream: torch.autograd.grad(o, x, u, retain_graph=True),
            )
            del out
        with torch.no_grad():
            yield from self.exchange()

    def exchange(self) -> Iterator[Row]:
        """The two exchanges of a forward pass, with their packing, and all-to-alls alone."""
        world, mine = dist.group.WORLD, self.mine
        given = (self.ranks - 1) * mine[0].nbytes // self.ranks
        counts = [self.lengths] * len(mine)
        yield self.timed(
            "sequence to heads",
            self.ranks,
            lambda: to_heads(mine, counts, world),
            given * len(mine),
        )
        (out,) = to_heads(mine[:1], counts[:1], world)
        yield self.timed(
            "heads to sequence", self.ranks, lambda: to_tokens([out], self.lengths, world), given
        )
        # Equal parts, as many bytes as the first exchange has on average.
        flat = torch.cat([x.flatten() for x in self.whole])
        sent = flat[: flat.numel() // self.ranks**2 * self.ranks].contiguous()
        got = torch.empty_like(sent)
        yield self.timed(
            "all-to-all alone",
            self.ranks,
            lambda: dist.all_to_all_single(got, sent),
            (self.ranks - 1) * sent.nbytes // self.ranks,
        )

    def timed(self, what: str, ranks: int, function: Callable[[], object], sent: int = 0) -> Row:
        """Time a call that all ranks make at once."""
        dist.barrier()
        times = seconds(function, self.upstream.device, self.repeats)
        slowest = torch.tensor(times, device=self.upstream.device, dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        values = slowest.tolist()
        return Row(self.name, what, ranks, statistics.median(values) * 1e3, spread(values), sent)


def _distance(found: Tensor, wanted: Tensor) -> Tensor:
    difference = found.double() - wanted.double()
    return (difference.norm() / wanted.double().norm()).nan_to_num(nan=torch.inf)


def work(rank: int, options: argparse.Namespace, folder: Path) -> None:
    """What one process does; the first prints and writes, also the largest error for the command.

    Args:
        rank: of the process.
        options: the command's.
        folder: in which the processes find each other.
    """
    device = torch.device("cuda", rank) if options.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=options.ranks,
        timeout=timedelta(minutes=5),
        device_id=device if device.type == "cuda" else None,
    )
    layer = SHAPES[options.shape] if device.type == "cuda" else TINY
    found: dict[str, list[Any]] = {"parity": [], "rows": []}
    for kind, gated in CASES:
        case = Case(kind, gated, layer, options)
        parity = case.parity()
        found["parity"].append(asdict(parity))
        if rank == 0:
            errors = ", ".join(f"{name} {error:.1e}" for name, error in parity.errors.items())
            print(f"{case.name}, {layer.grid.length:,} tokens as {case.lengths}", flush=True)
            print(f"  from one process: {errors}; {parity.chosen:.2%} choose otherwise", flush=True)
        for row in case.rows():
            found["rows"].append(asdict(row))
            if rank == 0:
                print(line_of(row), flush=True)
        del case
    worst = max(max(each["errors"].values()) for each in found["parity"])
    if rank == 0 and options.out:
        about: dict[str, Any] = provenance(
            device, command=["bench/parallel.py", *sys.argv[1:]], commit=options.commit
        )
        about |= {
            "shape": options.shape if device.type == "cuda" else "tiny",
            "grid": list(layer.grid.shape),
            "heads": layer.heads,
            "head_dim": layer.head_dim,
            "share": options.share,
            "ranks": options.ranks,
        }
        write(options.out, about | {"parity": found["parity"]}, found["rows"])
    if rank == 0:
        (folder / WORST).write_text(repr(worst))
    dist.destroy_process_group()


def line_of(row: Row) -> str:
    """For people."""
    rate = f", {row.sent / row.ms / 1e6:,.1f} GB/s from each" if row.sent else ""
    return f"  {row.what:18s} on {row.ranks}: {row.ms:9.3f} ms ±{row.spread:.0%}{rate}"


def main() -> None:
    """Check what is asked for, then start the processes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--ranks", type=int, help="processes; by default every GPU, 2 on a CPU")
    parser.add_argument("--shape", choices=SHAPES, default="wan-1.3b-480p", help="of the layer")
    parser.add_argument("--share", type=float, default=0.125, help="of the key tiles kept")
    parser.add_argument("--repeats", type=int, default=11, help="of every timing")
    parser.add_argument("--tolerance", type=float, default=1e-2, help="of relative distances")
    parser.add_argument("--commit", help="of the sources, where they are no clone")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write JSON")
    options = parser.parse_args()
    gpus = torch.cuda.device_count()
    options.ranks = options.ranks or (gpus if options.device == "cuda" else 2)
    if options.device == "cuda" and not 2 <= options.ranks <= gpus:
        parser.error(f"--ranks {options.ranks} needs as many GPUs, two at least; there are {gpus}")
    heads = (SHAPES[options.shape] if options.device == "cuda" else TINY).heads
    if options.ranks < 2 or heads % options.ranks:
        parser.error(f"--ranks {options.ranks} must be 2 or more and divide the {heads} heads")
    if options.out and not options.out.resolve().parent.is_dir():
        parser.error(f"--out {options.out} must lie in a folder that exists")
    with tempfile.TemporaryDirectory() as folder:
        # Forked from a process that imports PyTorch once, and never touches a GPU.
        multiprocessing.set_forkserver_preload(["torch._dynamo"])
        start_processes(
            work, (options, Path(folder)), nprocs=options.ranks, start_method="forkserver"
        )
        worst = float((Path(folder) / WORST).read_text())
    if worst > options.tolerance:
        raise SystemExit(
            f"ranks differ from one process by {worst:.1e}, more than {options.tolerance:g} allows"
        )


if __name__ == "__main__":
    main()
