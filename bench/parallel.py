# SPDX-License-Identifier: Apache-2.0
"""Ulysses on several GPUs: parity with one process, and what one GPU and all of them take.

usage: python bench/parallel.py [--shapes wan-14b-720p,...] [--ranks 2,4] [--out parallel.json]

Starts a process for each GPU of this machine, and measures with two, four and eight of them, as
many as there are. In every case each rank also computes the whole layer alone and compares its
share of the output and of the gradients, on the selection of one process; the command fails where
they differ by more than --tolerance. Then come times: eager calls of one GPU and of all, by several
ways of exchanging; exchange and kernels apart, for each rank; the host; CUDA graphs; and compiled
calls. What there is no time for within --seconds is left out, and said so.

``--tiny`` does the same with gloo on a CPU and small layers, to see that the script works; its
times mean nothing. ``python bench/draw.py scaling`` draws what is written.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

import vsa
from parallel_layer import Layer, Parity, Way, groups_of
from vsa.measure.provenance import provenance, write
from vsa.measure.shapes import SHAPES, Shape
from vsa.measure.timing import seconds, spread
from vsa.measure.ways import host_seconds, in_a_graph

DEFAULT = ("wan-14b-720p", "wan-14b-480p", "wan-1.3b-480p", "hunyuan-720p", "wan-1.3b-720p")
TINY = {
    "tiny": Shape(vsa.Grid((5, 5, 6)), 8, 16),
    "tiny-text": Shape(vsa.Grid((5, 5, 6), suffix=9), 8, 16),
}
MORE_CASES = (("even", True), ("uneven", True))
"""Shares and gates that the first shape is tried with, too."""
WAYS = (
    Way(),
    Way(1),
    Way(2),
    Way(4),
    Way(transport="functional"),
    Way(priority="high"),
)
BACKENDS = {"cpu": "aot_eager", "cuda": "inductor"}
"""Of torch.compile."""
TIMED, MOST_CALLS = 0.1, 10
"""Seconds of calls in a row, and how many they are at most."""
WORST = "worst"
"""The file in which the command finds the largest error."""


@dataclass(frozen=True)
class Row:
    """One timed call.

    Attributes:
        shape: of the layer.
        case: how the sequence is shared out.
        ranks: how many GPUs work on it together.
        mode: "eager", "compiled", "graph", "part" for a piece of a forward, or "host" for the time
            that the host takes to issue a call.
        what: one of ``DIRECTIONS``, or which part.
        way: how it is exchanged, empty where nothing is.
        ms: median of the slowest rank.
        per_rank_ms: medians of all ranks.
        spread: half the distance between the quartiles of the slowest times, as a share of ms.
        sent: bytes that a rank gives to others, 0 where that is not known.
    """

    shape: str
    case: str
    ranks: int
    mode: str
    what: str
    way: str
    ms: float
    per_rank_ms: list[float]
    spread: float
    sent: int = 0


@dataclass
class Session:
    """What one process knows.

    Attributes:
        options: the command's.
        rank: of the process.
        device: its own.
        begin: when the command began, by time.time.
        parity: found so far.
        rows: measured so far.
        left_out: what there was no time for.
    """

    options: argparse.Namespace
    rank: int
    device: torch.device
    begin: float
    parity: list[Parity] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def say(self, line: str) -> None:
        """By the first rank, for people."""
        if self.rank == 0:
            print(f"{time.time() - self.begin:5.0f} s  {line}", flush=True)

    def has_time(self, what: str, share: float, group: Any) -> bool:
        """Whether less than a share of --seconds has passed; the first rank says so for all."""
        late = torch.tensor(float(time.time() - self.begin > share * self.options.seconds))
        late = late.to(self.device)
        dist.broadcast(late, 0, group=group)
        if late.item():
            self.left_out.append(what)
            self.say(f"left out, for want of time: {what}")
        return not late.item()

    def timed(
        self,
        layer: Layer,
        function: Callable[[], object],
        mode: str,
        what: str,
        way: str = "",
        sent: int = 0,
    ) -> None:
        """Time a call that all ranks of a layer make at once, as often on each."""
        group = layer.groups["normal"]
        function()
        once = torch.tensor(seconds(function, self.device, 1, calls=1), device=self.device)
        dist.all_reduce(once, dist.ReduceOp.MAX, group)
        calls = min(MOST_CALLS, max(1, int(TIMED / once.item())))
        if mode == "host":
            times = [host_seconds(function, 1)]
        else:
            dist.barrier(group)
            times = seconds(function, self.device, self.options.repeats, calls)
        ranks = layer.ranks if way else 1
        of_all = torch.zeros(layer.ranks, len(times), device=self.device, dtype=torch.float64)
        of_all[layer.rank] = torch.tensor(times, dtype=torch.float64)
        dist.all_reduce(of_all, group=group)
        values = of_all.max(0).values.tolist()
        medians = [statistics.median(each) * 1e3 for each in of_all.tolist()]
        ms = statistics.median(values) * 1e3
        row = Row(layer.name, layer.case, ranks, mode, what, way, ms, medians, spread(values), sent)
        self.rows.append(row)
        self.say(line_of(row))

    def write(self, complete: bool) -> None:
        """All that is known so far, by the first rank."""
        if self.rank or not self.options.out:
            return
        about: dict[str, Any] = provenance(
            self.device, command=["bench/parallel.py", *sys.argv[1:]], commit=self.options.commit
        )
        about |= {
            "share": self.options.share,
            "gpus": max(self.options.ranks),
            "left_out": self.left_out,
            "parity": [asdict(each) for each in self.parity],
        }
        write(self.options.out, about, [asdict(row) for row in self.rows], complete)


def layers(session: Session, groups: dict[int, dict[str, Any]]) -> Iterator[Layer]:
    """Every shape on every number of ranks that divides its heads, of which this rank is one."""
    options = session.options
    for name in options.shapes:
        shape = {**SHAPES, **TINY}[name]
        for size, of_size in groups.items():
            if shape.heads % size == 0 and session.rank < size:
                yield Layer(name, shape, "even", False, options.share, of_size, session.device)


def eager(session: Session, layer: Layer) -> None:
    """Parity, then one GPU, all by each way, parts and the host."""
    session.parity.append(found := layer.parity())
    errors = ", ".join(f"{name} {error:.1e}" for name, error in found.errors.items())
    session.say(f"{layer.name}, {layer.case} over {layer.ranks}: {layer.lengths}")
    session.say(f"  from one process: {errors}; {found.chosen:.2%} choose otherwise")
    for what, call in layer.calls(layer.alone, alone=True).items():
        session.timed(layer, call, "eager", what)
    for way in WAYS:
        calls = layer.calls(lambda way=way: layer.by(way), alone=False)
        for what, call in calls.items():
            session.timed(layer, call, "eager", what, _name(way))
        if way == Way() and session.device.type == "cuda":
            for what, call in calls.items():
                session.timed(layer, call, "host", what, _name(way))
    for what, (call, sent) in layer.parts().items():
        session.timed(layer, call, "part", what, "alone", sent)


def more_cases(session: Session, groups: dict[int, dict[str, Any]]) -> None:
    """Gates and uneven shares, on all ranks."""
    options = session.options
    name, size = options.shapes[0], max(groups)
    shape = {**SHAPES, **TINY}[name]
    for kind, gated in MORE_CASES:
        layer = Layer(name, shape, kind, gated, options.share, groups[size], session.device)
        session.parity.append(layer.parity())
        for alone, attend, way in ((True, layer.alone, ""), (False, layer.together, _name(Way()))):
            for what, call in layer.calls(attend, alone).items():
                session.timed(layer, call, "eager", what, way)


def captured(session: Session, layer: Layer) -> None:
    """CUDA graphs of one call each."""
    for alone, attend, way in ((True, layer.alone, ""), (False, layer.together, _name(Way()))):
        for what, call in layer.calls(attend, alone).items():
            session.timed(layer, in_a_graph(call, 1), "graph", what, way)


def compiled(session: Session, layer: Layer) -> None:
    """Calls that torch.compile has compiled."""
    torch.compiler.reset()
    backend = BACKENDS[session.device.type]
    attend = torch.compile(layer.together, fullgraph=True, dynamic=False, backend=backend)
    for what, call in layer.calls(attend, alone=False).items():
        session.timed(layer, call, "compiled", what, _name(Way()))


def work(rank: int, options: argparse.Namespace, folder: Path, begin: float) -> None:
    """What one process does.

    Args:
        rank: of the process.
        options: the command's.
        folder: in which the processes find each other.
        begin: when the command began.
    """
    device = torch.device("cpu") if options.tiny else torch.device("cuda", rank)
    if options.tiny:
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo" if options.tiny else "nccl",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=max(options.ranks),
        timeout=timedelta(minutes=5),
        device_id=None if options.tiny else device,
    )
    session = Session(options, rank, device, begin)
    groups = {size: groups_of(size, device) for size in options.ranks}
    for layer in layers(session, groups):
        eager(session, layer)
        session.write(complete=False)
        del layer
    if session.has_time("gates and uneven shares", 0.6, dist.group.WORLD):
        more_cases(session, groups)
    kinds = [("CUDA graphs", captured, 0.7)] * (not options.tiny)
    kinds += [("compiled calls", compiled, 0.8)] * (not options.no_compile)
    for what, measure, share in kinds:
        for layer in layers(session, groups):
            if session.has_time(f"{what} of {layer.name}", share, layer.groups["normal"]):
                measure(session, layer)
                session.write(complete=False)
            del layer
    session.write(complete=True)
    if rank == 0:
        worst = max(max(each.errors.values()) for each in session.parity)
        (folder / WORST).write_text(repr(worst))
    dist.barrier()
    dist.destroy_process_group()


def _name(way: Way) -> str:
    parts = ["groups by size" if way.head_groups is None else f"{way.head_groups} groups"]
    parts += [way.transport] * (way.transport != "plain")
    parts += [f"{way.priority} priority"] * (way.priority != "normal")
    return ", ".join(parts)


def line_of(row: Row) -> str:
    """For people."""
    rate = f", {row.sent / row.ms / 1e6:,.1f} GB/s from each" if row.sent else ""
    ranks = "/".join(f"{ms:.3f}" for ms in row.per_rank_ms)
    text = f"  {row.mode:8s} {row.what:17s} on {row.ranks}: {row.ms:9.3f} ms ±{row.spread:.0%}"
    return f"{text}{rate} ({ranks}) {row.way}"


def _numbers(text: str) -> list[int]:
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"numbers such as 2,4 are needed, not {text!r}") from None


def main() -> None:
    """Check what is asked for, then start the processes."""
    begin = time.time()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="gloo on a CPU, small layers")
    parser.add_argument("--ranks", type=_numbers, help="numbers of processes, such as 2,4")
    parser.add_argument("--shapes", type=lambda text: text.split(","), help="of layers")
    parser.add_argument("--share", type=float, default=0.125, help="of the key tiles kept")
    parser.add_argument("--repeats", type=int, default=3, help="of every timing")
    parser.add_argument("--seconds", type=float, default=110.0, help="after which parts are left")
    parser.add_argument("--no-compile", action="store_true", help="leave compiled calls out")
    parser.add_argument("--tolerance", type=float, default=1e-2, help="of relative distances")
    parser.add_argument("--commit", help="of the sources, where they are no clone")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write JSON")
    options = parser.parse_args()
    known = TINY if options.tiny else SHAPES
    options.shapes = options.shapes or list(TINY if options.tiny else DEFAULT)
    unknown = [name for name in options.shapes if name not in known]
    if unknown:
        parser.error(f"--shapes must be of {', '.join(known)}, but one is {unknown[0]!r}")
    there = 2 if options.tiny else torch.cuda.device_count()
    options.ranks = options.ranks or [n for n in (2, 4, 8) if n <= there]
    if not options.ranks or (not options.tiny and not 2 <= max(options.ranks) <= there):
        asked = ",".join(map(str, options.ranks)) or "2"
        parser.error(f"--ranks {asked} needs as many GPUs, two at least; there are {there}")
    heads = min(known[name].heads for name in options.shapes)
    if min(options.ranks) < 2 or heads % min(options.ranks):
        parser.error(f"--ranks {min(options.ranks)} must be 2 or more and divide the {heads} heads")
    if options.out and not options.out.resolve().parent.is_dir():
        parser.error(f"--out {options.out} must lie in a folder that exists")
    with tempfile.TemporaryDirectory() as folder:
        # Forked from a process that imports PyTorch once, and never touches a GPU.
        multiprocessing.set_forkserver_preload(["torch._dynamo"])
        start_processes(
            work,
            (options, Path(folder), begin),
            nprocs=max(options.ranks),
            start_method="forkserver",
        )
        worst = float((Path(folder) / WORST).read_text())
    if worst > options.tolerance:
        raise SystemExit(
            f"ranks differ from one process by {worst:.1e}, more than {options.tolerance:g} allows"
        )


if __name__ == "__main__":
    main()
