# SPDX-License-Identifier: Apache-2.0
"""Sparsity patterns that kernels are measured on: which key tiles each query tile attends.

random      drawn uniformly: neighbours share as little as chance has it, the worst case
correlated  smooth noise that falls with distance: neighbours share most of their key tiles
captured    what a video transformer chose, from the file that bench/captured.py writes
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import vsa
from vsa.backends import BACKENDS, Request
from vsa.backends.kernels import KernelBackend
from vsa.backends.kernels.forward import neighbour_axes
from vsa.values import bitmap

DRAWN = ("random", "correlated")
KINDS = (*DRAWN, "captured")


def selection(
    kind: str,
    grid: vsa.Grid,
    heads: int,
    topk: int,
    device: torch.device,
    file: Path | None = None,
) -> vsa.Selection:
    """A pattern of a kind, the same for the same arguments on the same device.

    Args:
        kind: one of ``KINDS``.
        grid: queries and keys.
        heads: how many heads choose, each for itself.
        topk: key tiles of every query tile.
        device: where the pattern is made and stays.
        file: from bench/captured.py, for a captured pattern.

    Raises:
        ValueError: a captured pattern without a file, or of a layer that the file does not hold.
    """
    if kind == "captured":
        if file is None:
            raise ValueError("a captured pattern needs the file that bench/captured.py writes")
        return captured(file, grid, heads, topk).to(device)
    n = grid.num_tiles
    noise = torch.rand(1, heads, n, n, device=device, generator=_seeded(device))
    if kind == "correlated":
        axes = torch.unravel_index(torch.arange(n, device=device), grid.tiles)
        place = torch.stack(axes, 1).float()
        smooth = functional.interpolate(noise[:, :, ::8], size=(n, n), mode="bilinear")
        noise = smooth * 6 - torch.cdist(place, place) / 4
    kept = torch.zeros_like(noise, dtype=torch.bool)
    return vsa.Selection.from_mask(kept.scatter_(-1, noise.topk(topk).indices, True), grid)


def _seeded(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def layer_name(grid: vsa.Grid) -> str:
    """A grid as files and options write it, such as 20x48x80."""
    return "x".join(map(str, grid.shape))


def save(path: Path, about: dict[str, Any], layers: dict[str, vsa.Selection]) -> None:
    """Write selections by the name of their grid, with what made them."""
    bitmaps = {name: (x.bitmap.cpu(), x.num_key_tiles) for name, x in layers.items()}
    torch.save({"about": about, "layers": bitmaps}, path)


def layers(path: Path) -> list[str]:
    """The grids that a file holds patterns for."""
    return list(_kept(path))


def _kept(path: Path) -> dict[str, tuple[Tensor, int]]:
    """Bitmaps and numbers of key tiles, by the name of their grid.

    Raises:
        ValueError: a file that ``save`` did not write.
    """
    try:
        return torch.load(path, weights_only=True)["layers"]
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, IndexError):
        raise ValueError(
            f"captured patterns come from a file of bench/captured.py, not from {path}"
        ) from None


def captured(path: Path, grid: vsa.Grid, heads: int, topk: int) -> vsa.Selection:
    """The first ``heads`` heads of the pattern for a grid.

    Raises:
        ValueError: a file without that grid, with fewer heads, or with another number of key tiles.
    """
    layers = _kept(path)
    name = layer_name(grid)
    if name not in layers:
        raise ValueError(f"{path} holds patterns for {', '.join(layers)}, but {name} is wanted")
    words, num_key_tiles = layers[name]
    found = vsa.Selection(words[:, :heads].contiguous(), num_key_tiles, grid, grid)
    if found.shape != (1, heads, grid.num_tiles, grid.num_tiles):
        raise ValueError(
            f"{path} holds {found.shape[1]} heads and {num_key_tiles} tiles for {name}, "
            f"but {heads} heads and {grid.num_tiles} tiles are wanted"
        )
    counts = bitmap.count(found.bitmap)
    if not bool((counts == topk).all()):
        raise ValueError(
            f"{path} keeps {int(counts.min())} to {int(counts.max())} key tiles for {name}, "
            f"but {topk} are wanted"
        )
    return found


def shared_along_w(selection: vsa.Selection) -> float:
    """Share of a tile's key tiles that the next tile along w keeps too, mean of the heads."""
    return vsa.diagnostics.neighbour_overlap(selection).w.mean().item()


def chosen_axes(selection: vsa.Selection) -> Tensor:
    """Along which axis the kernels take query tiles together, (B, heads): 0 for w, 1 for t.

    Args:
        selection: one that knows its queries' grid.
    """
    assert selection.grid is not None
    device = selection.bitmap.device
    request = Request(device.type, device.index)
    machine = next(
        backend.machine
        for backend in BACKENDS.values()
        if isinstance(backend, KernelBackend) and backend.why_not(request) is None
    )
    return neighbour_axes(
        machine, selection.bitmap.contiguous(), selection.grid.tiles, selection.shape[1]
    )


def reuse(selection: vsa.Selection, tiles: int, axes: Tensor | None = None) -> float:
    """How many of ``tiles`` consecutive query tiles want a key tile that any of them wants.

    It is what loads are divided by when a block of that many consumers shares them.

    Args:
        selection: of any grids; with ``axes`` it knows that of its queries.
        tiles: that share loads.
        axes: (B, heads) along which tiles follow each other, as of ``chosen_axes``; None for w.
    """
    mask = selection.mask()
    if axes is not None:
        assert selection.grid is not None
        along_t = torch.arange(mask.shape[2], device=mask.device).view(selection.grid.tiles[0], -1)
        along_t[:, 1::2] = along_t[:, 1::2].flip(0)  # serpentine
        mask = torch.where(axes[..., None, None] == 1, mask[:, :, along_t.T.flatten()], mask)
    whole = mask[:, :, : mask.shape[2] // tiles * tiles].unflatten(2, (-1, tiles))
    return (whole.sum() / whole.any(3).sum()).item()
