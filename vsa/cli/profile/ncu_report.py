# SPDX-License-Identifier: Apache-2.0
"""Reads what ``ncu --csv --page raw`` wrote: how busy each kernel kept the machine."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FLOP_PER_CLOCK = 4096
"""Of one multiprocessor of compute capability 9.0: dense 16-bit products, fp32 sums."""

PRODUCTS = {
    "FineForward": 2,
    "FineBackwardOnePass": 5,
    "FineBackwardKeys": 4,
    "FineBackwardQueries": 3,
}
"""Products that a kernel of ours makes of each selected pair of tiles, by a part of its name.

The first that is found counts: one pass is a kind of the pass over keys.
"""

# What to show, and the metrics that say it: names differ between versions, the first found counts.
TIME = ("gpu__time_duration.sum", "gpu__time_duration.avg")
CYCLES = ("sm__cycles_elapsed.max", "gpc__cycles_elapsed.max", "sm__cycles_elapsed.avg")
PROCESSORS = ("device__attribute_multiprocessor_count", "launch__sm_count")
PERCENT = {
    "tensor pipe": (
        "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
        "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active",
        "sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active",
        "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    ),
    "issue": (
        "smsp__issue_active.avg.pct_of_peak_sustained_active",
        "sm__inst_issued.avg.pct_of_peak_sustained_active",
    ),
    "L2 hits": ("lts__t_sector_hit_rate.pct",),
    "L2": ("lts__throughput.avg.pct_of_peak_sustained_elapsed",),
    "DRAM": (
        "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
        "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    ),
}
STALL = re.compile(
    r"^smsp__average_warps_issue_stalled_(\w+?)(?<!_not_issued)_per_issue_active\.ratio$"
)
SECONDS = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "s": 1.0}  # by the first letter of the unit


@dataclass(frozen=True)
class Kernel:
    """All launches of one kernel in a report; figures are means over them.

    Attributes:
        name: without namespaces and arguments.
        launches: how many the report has.
        seconds: of a launch; None where the report does not say, as for all that follow.
        cycles: clocks of a launch.
        processors: multiprocessors of the GPU.
        percent: the names of ``PERCENT`` -> what the report says.
        stalls: reason -> warps that wait for it whenever an instruction is issued, worst first.
    """

    name: str
    launches: int
    seconds: float | None
    cycles: float | None
    processors: float | None
    percent: Mapping[str, float | None]
    stalls: Mapping[str, float]

    def mfu(self, forward_flops: float) -> float | None:
        """Products over what the tensor cores could do in the same clocks, where we know them.

        Args:
            forward_flops: operations of the fine stage's forward, two products, on selected tokens.
        """
        count = next((n for part, n in PRODUCTS.items() if part in self.name), None)
        if count is None or not self.cycles or not self.processors:
            return None
        return forward_flops * count / 2 / (self.cycles * self.processors * FLOP_PER_CLOCK)


def read(path: Path) -> list[Kernel]:
    """Kernels of a report, in the order of their first launch.

    Raises:
        ValueError: a file that is not such a report, in one sentence.
    """
    lines = path.read_text(errors="replace").splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None or len(lines) < start + 3:
        raise ValueError(
            f"{path} is not a report with kernels in it: make it by "
            "ncu --import FILE.ncu-rep --csv --page raw"
        )
    units, *rows = csv.DictReader(lines[start:])
    if "Kernel Name" not in units:
        raise ValueError(f"{path} has no column Kernel Name: make it with --page raw")
    launches: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        launches.setdefault(_short(row["Kernel Name"]), []).append(row)
    return [_kernel(name, mine, units) for name, mine in launches.items()]


def _kernel(name: str, rows: list[dict[str, str]], units: dict[str, str]) -> Kernel:
    seconds = _mean(rows, *TIME)
    unit = next((units[x] for x in TIME if units.get(x)), "s")
    found = {
        match[1]: metric
        for metric in units
        if (match := STALL.match(metric)) and match[1] != "selected"  # those that issue
    }
    stalls = {reason: _mean(rows, metric) or 0.0 for reason, metric in found.items()}
    return Kernel(
        name=name,
        launches=len(rows),
        seconds=None if seconds is None else seconds * SECONDS.get(unit[:1], 1.0),
        cycles=_mean(rows, *CYCLES),
        processors=_mean(rows, *PROCESSORS),
        percent={what: _mean(rows, *metrics) for what, metrics in PERCENT.items()},
        stalls=dict(sorted(stalls.items(), key=lambda item: -item[1])),
    )


def _mean(rows: list[dict[str, str]], *metrics: str) -> float | None:
    """Of the first metric that the report has."""
    for metric in metrics:
        values = [x for row in rows if (x := _number(row.get(metric))) is not None]
        if values:
            return sum(values) / len(values)
    return None


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def _short(name: str) -> str:
    """A kernel's name without return type, namespaces and arguments."""
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    depth = 0
    for place, letter in enumerate(name):  # arguments begin outside of template parameters
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:place]
            break
    return re.sub(r"\b(?:\w+::)+", "", name)
