# SPDX-License-Identifier: Apache-2.0
"""The picture of streaming.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vsa.diagnostics import theme

EVERY = 3
"""Frames between two that are shown: the last one of each chunk."""


class Panel(NamedTuple):
    """A row of frames.

    Attributes:
        name: what it shows.
        frames: (T, H, W, 3) uint8.
    """

    name: str
    frames: Tensor


def draw(
    out: Path,
    rows: Sequence[Panel],
    source: str,
    losses: Sequence[float],
    difference: float,
    chunk: tuple[int, ...],
    milliseconds: dict[str, list[float]],
) -> None:
    """Frames above, the loss and the times of a chunk below.

    Args:
        out: the PNG to write.
        rows: of frames, one for each chunk.
        source: of the clip.
        losses: of the training steps.
        difference: between the outputs by mask and by cache, relative.
        chunk: tokens of a timed chunk.
        milliseconds: of a chunk's attention by the number of chunks.
    """
    shown = [torch.cat(tuple(row.frames[EVERY - 1 :: EVERY]), dim=1).numpy() for row in rows]
    with theme.new_figure(9.5, 1.16 * len(rows) + 3.2, out) as figure:
        heights = [1.16] * len(rows) + [2.9]
        cells = figure.add_gridspec(len(rows) + 1, 2, height_ratios=heights)
        for place, (panel, image) in enumerate(zip(rows, shown, strict=True)):
            axes = figure.add_subplot(cells[place, :])
            axes.imshow(image, interpolation="nearest", aspect="equal")
            axes.set_title(panel.name, fontsize=9, pad=2)
            axes.set_axis_off()
        _learning(figure.add_subplot(cells[-1, 0]), losses)
        _costs(figure.add_subplot(cells[-1, 1]), chunk, milliseconds)
        theme.title(
            figure,
            f"{source}, the last frame of each chunk of three. Outputs by training's mask and by "
            f"the cache differ by {difference:.0e} (relative).",
        )


def _learning(axes: theme.Axes, losses: Sequence[float]) -> None:
    part = max(1, len(losses) // 30)
    means = torch.tensor(losses)[: len(losses) // part * part].view(-1, part).mean(1).tolist()
    steps = [(place + 0.5) * part for place in range(len(means))]
    axes.plot(steps, means, color=theme.BLUE)
    axes.set_ylim(bottom=0)
    axes.set_title("training: loss", fontsize=10)
    axes.set_xlabel(f"step (means of {part})")
    axes.grid(axis="y")


def _costs(axes: theme.Axes, chunk: tuple[int, ...], milliseconds: dict[str, list[float]]) -> None:
    names = {
        "dense": ("dense, PyTorch", theme.ORANGE),
        "sparse": ("12.5 % of the tiles, cache", theme.BLUE),
    }
    for name, (told, colour) in names.items():
        took = milliseconds[name]
        axes.plot(range(1, len(took) + 1), took, color=colour, marker="o", markersize=3)
        end = len(took), took[-1]
        axes.annotate(
            told, end, (-4, 5), textcoords="offset points", color=colour, fontsize=9, ha="right"
        )
    axes.set_ylim(0, 1.15 * max(max(took) for took in milliseconds.values()))
    size = " x ".join(map(str, chunk))
    axes.set_title("attention of one chunk, in milliseconds", fontsize=10)
    axes.set_xlabel(f"chunks of {size} tokens so far (one CPU thread, one run)")
    axes.grid(axis="y")
