# SPDX-License-Identifier: Apache-2.0
"""The demo's picture: which tiles were chosen, what is lost, what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from vsa.cli.demo import clip as clips
from vsa.diagnostics import theme
from vsa.diagnostics.theme import BLUE, INK, MUTED, ORANGE, PALE
from vsa.values.grid import Grid

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vsa.cli.demo.experiment import Findings

HEAD = clips.HEADS.index("place")
"""The head whose choice is drawn: it minds looks and distance alike."""
MOST_FRAMES = 6
DIFFERENCE_GAIN = 10

Box = tuple[tuple[float, float], int, int]


def draw(findings: Findings, path: Path, busy: bool = False) -> None:
    """Write one PNG of 1800 x 1250 pixels; ``busy`` if its times are not to be trusted."""
    with theme.new_figure(12, 25 / 3, path, layout=None) as figure:
        top, bottom = figure.subfigures(2, 1, height_ratios=(1.75, 1), squeeze=False)[:, 0]
        left, middle, right = bottom.subfigures(1, 3, width_ratios=(1, 1.2, 1), squeeze=False)[0]
        _draw_selection(findings, top)
        panel = {"bottom": 0.17, "top": 0.86}
        _draw_recall(findings, left.subplots(gridspec_kw={"left": 0.18, "right": 0.96, **panel}))
        _draw_outputs(findings, middle)
        place = {"left": 0.05, "right": 0.95, **panel}
        _draw_cost(findings, busy, right.subplots(gridspec_kw=place))


def _draw_selection(findings: Findings, figure: Figure) -> None:
    """A frame of every layer of tiles: kept tiles in colour, stronger if more attended."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    grid, clip = findings.grid, findings.clip
    query = _query_tile(findings)
    kept = findings.selection.mask()[0, HEAD, query].cpu()
    mass = _attention(findings, query)
    strength = 0.5 + 0.5 * (mass / mass[kept].max()).clamp(max=1).sqrt()
    opacity = torch.where(kept, strength, 0.12)[grid.tile_of_token()].view(grid.shape)
    boxes = _boxes(grid)
    per_layer = grid.num_tiles // grid.tiles[0]
    query_layer = query // per_layer
    layers = _layers(grid.tiles[0], query_layer)

    height, width = clip.frames.shape[2:]
    across = -(-len(layers) // 2) if len(layers) > 3 and width > height else len(layers)
    down = -(-len(layers) // across)
    place = {
        "left": 0.02,
        "right": 0.98,
        "bottom": 0.01,
        "top": 0.84,
        "wspace": 0.03,
        "hspace": 0.12,
    }
    panels = list(figure.subplots(down, across, squeeze=False, gridspec_kw=place).flat)
    for axes in panels:
        axes.axis("off")
    for axes, layer in zip(panels, layers, strict=False):
        latent = min(layer * grid.box[0] + grid.box[0] // 2, grid.shape[0] - 1)
        image = rearrange(clip.frames[latent * clips.TOKEN_FRAMES], "c h w -> h w c")
        pale = 0.35 * image.mean(-1, keepdim=True) + 0.6
        side = clips.TOKEN_PIXELS
        alpha = repeat(opacity[latent], "h w -> (h y) (w x) 1", y=side, x=side)
        axes.imshow((alpha * image + (1 - alpha) * pale).numpy())
        tiles = range(layer * per_layer, (layer + 1) * per_layer)
        outlines = [Rectangle(*boxes[tile]) for tile in tiles if kept[tile]]
        axes.add_collection(
            PatchCollection(outlines, facecolor="none", edgecolor=BLUE, linewidth=1.2)
        )
        if layer == query_layer:
            axes.add_patch(
                Rectangle(*boxes[query], facecolor="none", edgecolor=ORANGE, linewidth=4)
            )
        number = clip.numbers[latent * clips.TOKEN_FRAMES]
        axes.set_title(f"frame {number}", fontsize=9, fontweight="normal", color=MUTED, pad=3)

    parts = (
        ("One query tile ", INK),
        ("(orange)", ORANGE),
        (f" and the {int(kept.sum())} of {grid.num_tiles} key tiles it attends ", INK),
        ("(blue)", BLUE),
    )
    _write_in_colours(figure, parts, left=0.02, bottom=0.93)
    figure.text(
        0.02,
        0.89,
        f"They hold {float(mass[kept].sum()):.0%} of the query tile's dense attention in the head "
        f"“{clips.HEADS[HEAD]}”, which goes by looks and by distance; "
        + ("no tile is left out." if kept.all() else "the pale tiles are never read."),
        fontsize=10.5,
        color=MUTED,
    )


def _write_in_colours(
    figure: Figure, parts: tuple[tuple[str, str], ...], left: float, bottom: float
) -> None:
    from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, TextArea

    words: list[Artist] = [
        TextArea(text, textprops={"color": colour, "size": 16, "weight": "bold"})
        for text, colour in parts
    ]
    line = AnchoredOffsetbox(
        loc="lower left",
        child=HPacker(children=words, pad=0, sep=0),
        frameon=False,
        pad=0,
        borderpad=0,
        bbox_to_anchor=(left, bottom),
        bbox_transform=figure.transSubfigure,
    )
    figure.add_artist(line)


def _layers(count: int, query_layer: int) -> list[int]:
    """At most ``MOST_FRAMES`` layers of tiles, spread over the clip, the query's among them."""
    spread = torch.linspace(0, count - 1, min(count, MOST_FRAMES)).round().int().tolist()
    nearest = min(range(len(spread)), key=lambda index: abs(spread[index] - query_layer))
    spread[nearest] = query_layer
    return spread


def _query_tile(findings: Findings) -> int:
    """A whole tile in the middle of the clip, where much changes and attention is kept well."""
    grid = findings.grid
    side = clips.TOKEN_PIXELS
    tokens = reduce(
        findings.clip.frames,
        "(t f) c (h y) (w x) -> t h w c",
        "mean",
        f=clips.TOKEN_FRAMES,
        y=side,
        x=side,
    )
    change = tokens.var(0, correction=0).sum(-1).sqrt().expand(grid.shape).flatten()
    each = torch.stack((change, findings.token_recall[HEAD]), dim=-1)
    change, recall = (grid.to_tiles(each[None])[0].sum(1) / grid.sizes[:, None]).unbind(-1)
    layer = torch.arange(grid.num_tiles) // (grid.num_tiles // grid.tiles[0])
    central = (layer - (grid.tiles[0] - 1) / 2).abs() < 1
    return int((central * grid.sizes * (change + 1e-6) * recall).argmax())


def _attention(findings: Findings, query: int) -> Tensor:
    """Share of the query tile's dense attention on each key tile, (n,), in the head drawn."""
    grid = findings.grid
    token = grid.tokens_of_tiles()[query]
    q, k = (x[0, :, HEAD].float().cpu() for x in (findings.q, findings.k))
    weights = torch.softmax(q[token[token >= 0]] @ k.T * q.shape[-1] ** -0.5, dim=-1).mean(0)
    return grid.to_tiles(weights[None])[0].sum(-1)


def _boxes(grid: Grid) -> list[Box]:
    """Corner (x, y), width and height of every tile, in pixels."""
    (_, rows, columns), (_, high, wide), (_, height, width) = grid.tiles, grid.box, grid.shape
    side, boxes = clips.TOKEN_PIXELS, []
    for tile in range(grid.num_tiles):
        y, x = tile // columns % rows * high, tile % columns * wide
        size = min(wide, width - x) * side, min(high, height - y) * side
        boxes.append(((x * side - 0.5, y * side - 0.5), *size))
    return boxes


def _draw_recall(findings: Findings, axes: Axes) -> None:
    """Recall over the share of tiles kept, against tiles drawn at random."""
    counts = sorted(findings.recall)
    density = [count / findings.grid.num_tiles for count in counts]
    chosen = torch.stack([findings.recall[count] for count in counts])
    drawn = torch.stack([findings.random_recall[count] for count in counts]).mean(-1)
    own, own_recall = (
        findings.count / findings.grid.num_tiles,
        float(findings.recall[findings.count].mean()),
    )
    axes.fill_between(
        density, chosen.amin(-1), chosen.amax(-1), color=BLUE, alpha=0.15, linewidth=0
    )
    axes.plot(density, chosen.mean(-1), color=BLUE, linewidth=2.5)
    axes.plot(density, drawn, color=MUTED, linewidth=2, linestyle=(0, (4, 2)))
    axes.plot(own, own_recall, "o", color=BLUE, markersize=9, markeredgecolor="white")
    axes.set_xscale("log")
    axes.set_xticks([0.01, 0.1, 1], ["1 %", "10 %", "100 %"])
    axes.set_yticks([0, 0.5, 1], ["0", "50 %", "100 %"])
    axes.set(ylim=(0, 1.36), xlabel="key tiles kept (log scale)")  # room for words above
    axes.spines["left"].set_bounds(0, 1)
    axes.set_title("Attention on the kept tiles")
    height = min(0.48, own_recall - 0.1)
    axes.plot([own, own], [height, own_recall], color=BLUE, linewidth=1)
    axes.annotate(
        f"{own_recall:.0%} with {own:.1%}\nof the tiles",
        (own, height),
        (-5 if own > 0.3 else 0, -2),
        textcoords="offset points",
        ha="left" if own < 0.05 else "right" if own > 0.3 else "center",
        va="top",
        color=BLUE,
        fontweight="bold",
        bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 1},
    )
    words: dict[str, Any] = {"transform": axes.transAxes, "va": "top"}
    axes.text(0.02, 1.0, "line: chosen by vsa (band: heads)", color=BLUE, **words)
    axes.text(0.02, 0.89, "dashed: as many random tiles", color=MUTED, **words)


def _draw_outputs(findings: Findings, figure: Figure) -> None:
    """The clip's pixels before and after attention, in the frame of the query tile."""
    grid, clip = findings.grid, findings.clip
    layer = _query_tile(findings) * grid.tiles[0] // grid.num_tiles
    latent = min(layer * grid.box[0] + grid.box[0] // 2, grid.shape[0] - 1)
    dense, sparse = (
        clips.to_pixels(clip, run.out.view(1, *grid.shape, *run.out.shape[2:]), latent)
        for run in (findings.dense, findings.sparse)
    )
    difference = (DIFFERENCE_GAIN * (sparse - dense).abs()).clamp(max=1)
    source = rearrange(clip.frames[latent * clips.TOKEN_FRAMES], "c h w -> h w c")
    place = {
        "left": 0.02,
        "right": 0.98,
        "bottom": 0.06,
        "top": 0.72,
        "wspace": 0.06,
        "hspace": 0.24,
    }
    down, across = (1, 4) if grid.shape[1] > grid.shape[2] else (2, 2)
    panels = figure.subplots(down, across, gridspec_kw=place)
    gain = f"difference{chr(10) if down == 1 else ' '}× {DIFFERENCE_GAIN}"
    pictures = {
        "the clip": source,
        "dense": dense,
        "sparse": sparse,
        gain: 1 - difference,
    }
    for axes, (name, image) in zip(panels.flat, pictures.items(), strict=True):
        axes.imshow(image.numpy())
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(visible=True, color=PALE, linewidth=0.8)
        axes.set_title(name, fontsize=9, fontweight="normal", color=MUTED, pad=3, loc="center")
    figure.text(0.02, 0.89, "What attention makes of the pixels", fontsize=12, fontweight="bold")
    explained = "It averages patches that look alike, hence the blur. White: no difference."
    figure.text(0.02, 0.835, explained, fontsize=8, color=MUTED)


def _draw_cost(findings: Findings, busy: bool, axes: Axes) -> None:
    """Dense and sparse side by side, each pair on a scale of its own."""
    dense, sparse = findings.dense, findings.sparse
    pairs = {
        "time, forward": (dense.forward, sparse.forward, "faster", "slower"),
        "time, forward + backward": (dense.both, sparse.both, "faster", "slower"),
        "FLOPs, forward + backward": (*findings.flops, "fewer", "more"),
    }
    for row, (name, (before, after, better, worse)) in enumerate(pairs.items()):
        y = 3.2 * row
        longest = max(before, after)
        axes.barh([y, y + 1], [before / longest, after / longest], height=0.9, color=[PALE, BLUE])
        write = _giga if "FLOPs" in name else _seconds
        gain = (
            f"{before / after:.1f}× {better}"
            if after <= before
            else f"{after / before:.1f}× {worse}"
        )
        axes.text(0, y - 0.6, name, va="bottom")
        if not busy or "FLOPs" in name:
            axes.text(1, y - 0.6, gain, va="bottom", ha="right", color=BLUE, fontweight="bold")
        axes.text(0.02, y, f"dense {write(before)}", va="center")
        fits = after / longest > 0.4
        place, colour = (0.02, "white") if fits else (after / longest + 0.02, BLUE)
        axes.text(
            place, y + 1, f"sparse {write(after)}", va="center", color=colour, fontweight="bold"
        )
    axes.set(xlim=(0, 1), ylim=(8.0, -1.3))
    axes.axis("off")
    axes.set_title("Busy machine: no gain in time" if busy else "What it costs here")
    axes.text(0, -0.1, findings.machine, transform=axes.transAxes, fontsize=7.5, color=MUTED)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def _giga(value: float) -> str:
    return f"{value / 1e9:.3g} G"
