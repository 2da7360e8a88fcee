# SPDX-License-Identifier: Apache-2.0
"""The picture of docs/sequences.md: the tiles of a mixed sequence, and what each of them attends.

    python bench/sequence_picture.py --out bench/pictures/sequence.png

The choice is a real one, ``vsa.select`` of random queries and keys that drift along each video.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch, Rectangle

import vsa
from vsa import Segment
from vsa.diagnostics import theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SEQUENCE = vsa.Sequence(
    [
        Segment(150, name="text"),
        Segment((3, 8, 12), name="reference", topk=0.5),
        Segment(100, name="audio"),
        Segment((5, 10, 12), name="video"),
    ]
)
TOPK = 0.2
COLOURS = {
    "text": theme.SAND,
    "reference": theme.LIGHT_PURPLE,
    "audio": theme.TAN,
    "video": theme.LIGHT_BLUE,
}
KINDS = {
    "dense rows: every tile": theme.PALE,
    "kept: for every query": theme.SAND,
    "chosen": theme.BLUE,
    "could be chosen": theme.NO_TILE,
}


def drifting(sequence: vsa.Sequence, channels: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys (1, S, 1, channels) that are alike where tokens of a video are near."""
    generator = torch.Generator().manual_seed(1)
    waves = torch.randn(3, channels, generator=generator)
    shift = 6.28 * torch.rand(channels, generator=generator)
    found = []
    for segment in sequence.segments:
        T, H, W = segment.boxes.shape
        place = torch.cartesian_prod(torch.arange(T), torch.arange(H), torch.arange(W)).float()
        found.append(torch.cos(0.35 * place.view(-1, 3) @ waves + shift))
    x = torch.cat(found)[None, :, None]
    q, k = (x + 0.3 * torch.randn(x.shape, generator=generator) for _ in range(2))
    return q, k


def kinds(sequence: vsa.Sequence, selection: vsa.Selection) -> torch.Tensor:
    """(all tiles, all tiles), which of ``KINDS`` each pair is, counted from 0."""
    chosen = selection.mask()[0, 0]
    rows = []
    for place, segment in enumerate(sequence.segments):
        parts = []
        for at, keys in enumerate(sequence.segments):
            block = torch.zeros(segment.num_tiles, keys.num_tiles, dtype=torch.int64)
            if segment.is_sparse:
                block += 1
                if keys.competes:
                    of = chosen[sequence.query_tiles_of(place), sequence.key_tiles_of(at)]
                    block = torch.where(of, 2, 3)
            parts.append(block)
        rows.append(torch.cat(parts, 1))
    return torch.cat(rows)


def draw_strip(axes: Axes, sequence: vsa.Sequence) -> None:
    """The sequence as it lies in memory, each segment cut into its tiles."""
    first = 0
    for segment in sequence.segments:
        colour = COLOURS[str(segment.name)]
        at = first
        for size in segment.boxes.sizes.tolist():
            box: dict[str, Any] = {"facecolor": colour, "edgecolor": "white", "linewidth": 0.7}
            axes.add_patch(Rectangle((at, 0), size, 1, **box))
            at += size
        shape = (
            segment.shape if isinstance(segment.shape, int) else "x".join(map(str, segment.shape))
        )
        axes.text((first + at) / 2, 1.25, f"{segment.name}\n{shape}", ha="center", fontsize=9)
        first = at
    axes.set(
        xlim=(0, first),
        ylim=(0, 2.3),
        yticks=[],
        xlabel="tokens; a video's tiles are boxes, drawn here side by side",
    )
    axes.spines[["left", "bottom"]].set_visible(False)


def draw_map(axes: Axes, sequence: vsa.Sequence, selection: vsa.Selection) -> None:
    """Which key tiles each query tile attends."""
    colours = ListedColormap(list(KINDS.values()))
    last = len(KINDS) - 1
    axes.imshow(kinds(sequence, selection), cmap=colours, vmin=0, vmax=last, interpolation="none")
    at, middles = 0, []
    for segment in sequence.segments:
        middles.append(at + segment.num_tiles / 2 - 0.5)
        at += segment.num_tiles
        if at < sequence.num_tiles:
            axes.axhline(at - 0.5, color="white", linewidth=2.5)
            axes.axvline(at - 0.5, color="white", linewidth=2.5)
    names = [str(segment.name) for segment in sequence.segments]
    axes.set_xticks(middles, names)
    axes.set_yticks(middles, names)
    axes.tick_params(length=0)
    axes.xaxis.tick_top()
    axes.set(xlabel="tiles of keys", ylabel="tiles of queries")
    axes.xaxis.set_label_position("top")
    axes.spines[["left", "bottom"]].set_visible(False)
    patches = [Patch(color=colour, label=label) for label, colour in KINDS.items()]
    axes.legend(handles=patches, loc="upper left", bbox_to_anchor=(1.02, 1.0))
    note = (
        f"Each query tile of a video keeps\n{sequence.segment('reference').topk:.0%} of the "
        f"reference's tiles\nand {TOPK:.0%} of the video's:\ntwo competitions."
    )
    axes.text(1.04, 0.80, note, transform=axes.transAxes, va="top", fontsize=9, color=theme.MUTED)


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("sequence.png"), help="the PNG to write")
    out = parser.parse_args().out
    q, k = drifting(SEQUENCE)
    selection = vsa.select(q, k, TOPK, grid=SEQUENCE)
    with theme.new_figure(8.4, 6.6, out) as figure:
        strip, tiles = figure.subplots(2, 1, height_ratios=(1, 4.6))
        draw_strip(strip, SEQUENCE)
        draw_map(tiles, SEQUENCE, selection)


if __name__ == "__main__":
    main()
