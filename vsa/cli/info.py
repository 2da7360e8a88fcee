# SPDX-License-Identifier: Apache-2.0
"""``vsa info``: what is built, which backend runs here and why, and which hosts take it."""

from __future__ import annotations

import json
import platform
import warnings
from importlib.resources import files

import torch
from rich.console import Console
from rich.table import Table

import vsa
from video_sparse_attention import FOREIGN, neighbour
from vsa.backends import BACKENDS, Request, choose
from vsa.integrations.hosts.found import HOSTS, hosts_found
from vsa.measure.machine import processor

BESIDE = (
    "its import name is vsa too; import vsa gives this project, whose video_sparse_attn and "
    "block_sparse_attn take the calls of its functions; if it overwrites vsa/__init__.py later, "
    f"run: vsa mend; to have only this project, run: pip uninstall -y {FOREIGN}, then vsa mend"
)
"""What another distribution of the import name means while our own files are whole."""


def info() -> None:
    """What is built, which backend runs on each device here and why, and which hosts take it."""
    console = Console()
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    facts.add_row("vsa", f"{vsa.__version__}, in {files(vsa)}")
    if beside := neighbour():
        facts.add_row("beside it", f"{beside}: {BESIDE}")
    facts.add_row("compiled part", compiled_part())
    facts.add_row("Python", f"{platform.python_version()} on {platform.platform()}")
    facts.add_row("PyTorch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}")
    for device in devices():
        facts.add_row(
            str(device), f"{describe(device)}: auto takes [bold]{automatic(device)}[/bold]"
        )
    for host, how in hosts_found():
        facts.add_row("host", f"{host} {how}")
    if not hosts_found():
        facts.add_row("host", f"none of {', '.join(host.distribution for host in HOSTS)}")
    console.print(facts)
    console.print()
    console.print(backend_table())


def backend_table() -> Table:
    """Every backend, what it is for, and on which devices of this machine it runs or why not."""
    table = Table("backend", "for", *map(str, devices()))
    for backend in BACKENDS.values():
        reasons = (backend.why_not(Request(device.type, device.index)) for device in devices())
        table.add_row(
            f"[bold]{backend.name}[/bold]",
            backend.purpose,
            *("[green]runs[/green]" if reason is None else f"no: {reason}" for reason in reasons),
        )
    return table


def devices() -> list[torch.device]:
    """The devices of this machine: the CPU, then every GPU."""
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [torch.device("cpu"), *gpus]


def describe(device: torch.device) -> str:
    """A device's name and size."""
    if device.type == "cpu":
        return f"{processor()}, {torch.get_num_threads()} threads"
    found = torch.cuda.get_device_properties(device)
    return f"{found.name}, sm_{found.major}{found.minor}, {found.total_memory / 2**30:.0f} GiB"


def automatic(device: torch.device) -> str:
    """What backend="auto" takes for bf16 inputs of head_dim 128, without and with gradients."""
    request = device.type, device.index, str(torch.bfloat16), 128
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table below gives the same reasons
        inference, training = (choose("auto", *request, gradients) for gradients in (False, True))
    return inference if inference == training else f"{inference}, for training {training}"


def compiled_part() -> str:
    """What vsa._C holds, or why it is missing."""
    try:
        import vsa._C as _C
    except ImportError as error:
        record = files(vsa) / "_build.json"
        why = json.loads(record.read_text())["why"] if record.is_file() else str(error)
        return f"[yellow]not built: {why}[/yellow]"
    built = _C.build_info()
    record = json.loads((files(vsa) / "_build.json").read_text())
    if not built["cuda"]:
        return f"host part only, [yellow]no CUDA kernels: {record['why']}[/yellow]"
    timed = (
        "whose machine code was timed"
        if record["measured"]
        else "[yellow]whose machine code was not timed[/yellow]"
    )
    made = f"{', '.join(built['architectures'])} by CUDA {built['cuda_version']}"
    return f"{made}, {timed}; {built['compiler']}"
