# SPDX-License-Identifier: Apache-2.0
"""What a user passes, checked and brought into one form before any work is done."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vsa import backends
from vsa.values import checks, hints, masks, transforms
from vsa.values import precision as precisions
from vsa.values.grid import SLOTS, Extent, Grid
from vsa.values.masks import ChunkCausal, TeacherForcing
from vsa.values.selection import Selection, check_fits, check_is_selection
from vsa.values.sequence import Sequence
from vsa.values.tile_mask import TileMask

DEFAULT_TILE = (4, 4, 4)
Tile = Extent | Literal["auto"]
Layout = Extent | Grid | Sequence
"""What ``grid`` may be where a sequence is allowed."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """Checked inputs of the fine stage, flat and in one type.

    Attributes:
        q: (B, S_q, heads, head_dim), any strides but a contiguous last dimension.
        k: (B, S_k, kv_heads, head_dim), likewise.
        v: like k.
        grid: the queries' grid.
        kv_grid: the keys' grid.
        scale: factor of the scores.
        text_valid: (B, prefix + suffix) bool or None for all valid.
        backend: the backend's name, never "auto".
        shape: the shape that the user's q had, which outputs take.
        given: q, k and v in one type, as the user shaped them.
        precision: "native", "int8" or "fp8", see ``vsa.attention``.
        mask: which tiles a row may choose, or a given selection was chosen from; None for all.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    grid: Grid
    kv_grid: Grid
    scale: float
    text_valid: Tensor | None
    backend: str
    shape: torch.Size
    given: tuple[Tensor, Tensor, Tensor]
    precision: str = "native"
    mask: TileMask | None = None


def resolve(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Layout | None = None,
    kv_grid: Layout | None = None,
    tile: Tile = DEFAULT_TILE,
    scale: float | None = None,
    text_valid: Tensor | None = None,
    selection: Selection | None = None,
    gates: Mapping[str, Tensor | None] | None = None,
    backend: str = "auto",
    precision: object = "native",
    mask: object = None,
) -> Inputs:
    """Check everything that the parts of ``vsa`` have in common.

    A caller without values passes k in their place. A selection brings the grids that the caller
    left out; gates are checked elsewhere.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what is allowed.
        RuntimeError: an explicit backend that cannot run here, with what is missing.
    """
    bits = precisions.named(precision)
    tensors = {"q": q, "k": k, "v": v}
    traced = torch.compiler.is_compiling()
    for name, x in tensors.items():
        checks.tensor(name, x)
        if not traced:
            checks.plain(name, x)
        checks.layout(name, x)
    q, k, v = under_autocast(q, k, v)
    checks.alike(q, {"k": k, "v": v})
    checks.keys_match(q, k, v)
    names = ["grid", "kv_grid"]
    if selection is not None:
        check_is_selection(selection)
        if grid is None and selection.grid is not None:
            grid, names[0] = selection.grid, "the grid of selection"
        if kv_grid is None and selection.kv_grid is not None:
            kv_grid, names[1] = selection.kv_grid, "the kv_grid of selection"
    if mask is not None or tile == "auto":
        tile = _tile_under(mask, tile, (q, k), (grid, kv_grid))
    query_grid = _grid_of(names[0], "q", q, grid, tile)
    key_grid = _key_grid(q, k, query_grid, kv_grid, tile, names[1])
    if text_valid is not None:
        check_text_valid(text_valid, q, query_grid, key_grid)
        text_valid = transforms.savable(text_valid)
    over_tiles: TileMask | None = None
    if selection is not None:
        check_fits(selection, q, query_grid, key_grid)
        over_tiles = selection.under
    if mask is not None:
        over_tiles = _over_tiles(mask, q, query_grid, key_grid)
    if bits != "native":
        precisions.check(bits, q, {**tensors, **(gates or {})})
    if not traced:
        hints.about_runs(q, grid, tile)
    scale = checks.scale(scale, q.shape[-1])
    backend = chosen(backend, q, k, v, gates or {}, bits, masked=over_tiles is not None)
    given = q, k, v
    if q.ndim == 6:  # last, since strides may make copies, and what is above may refuse
        q, k, v = q.flatten(1, 3), k.flatten(1, 3), v.flatten(1, 3)
    return Inputs(
        q=q,
        k=k,
        v=v,
        grid=query_grid,
        kv_grid=key_grid,
        scale=scale,
        text_valid=text_valid,
        backend=backend,
        shape=given[0].shape,
        given=given,
        precision=bits,
        mask=over_tiles,
    )


def _tile_under(
    mask: object,
    tile: Tile,
    tensors: tuple[Tensor, Tensor],
    grids: tuple[Layout | None, Layout | None],
) -> Tile:
    """The tile of queries and keys: under a rule "auto" means one for both."""
    masks.check(mask)
    (q, k), (grid, kv_grid) = tensors, grids
    if grid is None and q.ndim == 4 and isinstance(mask, (ChunkCausal, TeacherForcing)):
        raise ValueError(
            f"grid must say which frames q has under mask {type(mask).__name__}, but it is None "
            "and q is flat: pass grid=(T, H, W)"
        )
    if tile != "auto":
        return tile
    for known, x in ((kv_grid, k), (grid, q)):
        if isinstance(known, (Grid, Sequence)):
            return tile  # has one
        shape = known if known is not None else tuple(x.shape[1:4]) if x.ndim == 6 else None
        if shape is not None:
            return masks.tile_under(mask, checks.extent("grid", shape)) or tile
    return tile


def _over_tiles(mask: object, q: Tensor, grid: Grid, kv_grid: Grid) -> TileMask | None:
    """A mask on these grids."""
    if isinstance(mask, Tensor) and mask.device != q.device:
        raise ValueError(
            f"mask must share the device of q, but it is on {mask.device} and q is on {q.device}"
        )
    found = masks.resolve(mask, grid, kv_grid, q.shape[-2])
    if found is not None and found.allowed is not None:
        # A copy: a selection keeps it, whatever becomes of the mask that was given.
        return found._replace(allowed=found.allowed.clone())
    return found


def check_one_choice(mask: object, selection: object) -> None:
    """A mask is for a choice that is to be made."""
    if mask is not None and selection is not None:
        raise ValueError(
            "mask cannot stand beside selection, which is a choice already made: pass mask to "
            "vsa.select, whose selection brings it along"
        )


def check_inside(selection: Selection, call: Inputs) -> bool:
    """A given selection keeps nothing that the mask of a call forbids.

    Returns:
        Whether that follows from what the selection was chosen under, so that it need not be read
        of the next selection that was.
    """
    mask, under = call.mask, selection.under
    if mask is None or (under is not None and mask.rule and tuple(under.rule) == tuple(mask.rule)):
        return True
    is_cuda = selection.bitmap.is_cuda
    if torch.compiler.is_compiling() or (is_cuda and torch.cuda.is_current_stream_capturing()):
        raise ValueError(
            "selection was not chosen under this mask, and whether it is inside cannot be read "
            "here: choose it by vsa.select(..., mask=mask)"
        )
    if bool((selection.mask() & ~mask.matrix(call.grid.num_tiles, call.q.device)).any()):
        raise ValueError(
            "selection must lie inside of mask, but it keeps tiles that their query tiles may not "
            "choose"
        )
    return False


def chosen(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Mapping[str, Tensor | None],
    precision: str = "native",
    masked: bool = False,
) -> str:
    """Name of the backend; that of ``TRANSFORMS`` where a tensor needs more than a backward."""
    found: str | None = None
    if not torch.compiler.is_compiling():
        found = transforms.first_transformed({"q": q, "k": k, "v": v, **gates})
    if found is not None and backend not in ("auto", "torch"):
        raise NotImplementedError(
            f"{found} has a forward-mode tangent or is inside of a transform of torch.func, "
            f'which only backend="torch" follows, but backend is {backend!r}'
        )
    if found is not None:
        if backend == "auto":
            hints.about_transforms(found, q)
        return backends.TRANSFORMS.name
    return backends.choose(
        backend,
        q.device.type,
        q.device.index,
        str(q.dtype),
        operator.index(q.shape[-1]),
        wants_gradients(q, k, v),
        precision,
        masked,
    )


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd is on and any of those that are there needs a gradient."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


def under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast mixed types become autocast's; fp64 is left alone, as PyTorch does."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or torch.float64 in {x.dtype for x in tensors}:
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


def _grid_of(name: str, owner: str, x: Tensor, grid: Layout | None, tile: Tile) -> Grid:
    """The grid of a tensor, from the argument, from the tensor's own shape, or one-dimensional."""
    if isinstance(grid, Sequence):
        raise TypeError(
            f"{name} must be (T, H, W) or a vsa.Grid here, but it is a vsa.Sequence, which "
            "vsa.attention and its parts take"
        )
    if isinstance(grid, Grid):
        if tile not in (DEFAULT_TILE, "auto", grid.tile):
            raise ValueError(
                f"tile is {tile!r}, but {name} is a vsa.Grid whose tile is "
                f"{grid.tile}: give only one of them"
            )
        found = grid
    elif grid is not None:
        found = Grid(checks.extent(name, grid), tile=tile)
    elif x.ndim == 6:
        found = Grid((x.shape[1], x.shape[2], x.shape[3]), tile=tile)
    else:
        found = Grid(
            (1, 1, x.shape[1]), tile=(1, 1, SLOTS) if tile in (DEFAULT_TILE, "auto") else tile
        )
    if not torch.compiler.is_compiling():
        hints.about_thin_tiles(found, found.tile == tile == DEFAULT_TILE)
    if x.ndim == 4:
        source = f"its {name}" if grid is None else name
        found.check_length(owner, x.shape[1], source)
    elif found.text or found.shape != tuple(x.shape[1:4]):
        raise ValueError(
            f"{name} is {found.shape} with {found.text} text tokens, but {owner} is "
            "video-shaped with the grid "
            f"{tuple(x.shape[1:4])} and no room for text: pass a flat tensor or the grid of {owner}"
        )
    return found


def _key_grid(
    q: Tensor, k: Tensor, grid: Grid, kv_grid: Layout | None, tile: Tile, name: str
) -> Grid:
    """The keys' grid: the queries' unless ``kv_grid`` says otherwise."""
    if kv_grid is not None:
        return _grid_of(name, "k", k, kv_grid, tile)
    if k.shape[1:-2] != q.shape[1:-2]:
        raise ValueError(
            f"k has the grid or length {tuple(k.shape[1:-2])} and q has {tuple(q.shape[1:-2])}: "
            "pass kv_grid when the keys have a grid of their own"
        )
    return grid


def check_text_valid(value: object, q: Tensor, grid: Grid, kv_grid: Grid) -> None:
    """(B, prefix + suffix) bool that speaks of the queries' and the keys' text alike."""
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"text_valid must be a bool tensor, but it is {kind}")
    wanted = (q.shape[0], grid.text)
    if tuple(value.shape) != wanted:
        raise ValueError(
            f"text_valid must be (B, prefix + suffix) = {wanted}, but its shape is "
            f"{tuple(value.shape)}"
        )
    if (kv_grid.prefix, kv_grid.suffix) != (grid.prefix, grid.suffix):
        raise ValueError(
            "text_valid needs kv_grid to have the text of grid, but the keys have "
            f"prefix {kv_grid.prefix} and suffix {kv_grid.suffix}, the queries "
            f"{grid.prefix} and {grid.suffix}"
        )
    if value.device != q.device:
        raise ValueError(
            f"text_valid must share the device of q, but it is on {value.device} and "
            f"q is on {q.device}"
        )


def check_must(
    value: object, q: Tensor, grid: Grid, kv_grid: Grid, mask: TileMask | None = None
) -> None:
    """None, "self", or (n_q, n_k) bool on the device of q, inside of a mask that is a rule.

    Reading whether it is inside waits for the device, so neither compiled code nor a capture does.
    """
    if value is None:
        return
    if isinstance(value, str):
        if value != "self":
            raise ValueError(f'must is a bool mask (n_q, n_k) or "self", but it is {value!r}')
        if grid.num_tiles != kv_grid.num_tiles:
            raise ValueError(
                'must="self" needs as many key tiles as query tiles, but there are '
                f"{kv_grid.num_tiles} and {grid.num_tiles}"
            )
        return
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f'must is a bool mask (n_q, n_k) or "self", but it is {kind}')
    if tuple(value.shape) != (grid.num_tiles, kv_grid.num_tiles):
        raise ValueError(
            f"must has to be (n_q, n_k) = {(grid.num_tiles, kv_grid.num_tiles)}, but "
            f"its shape is {tuple(value.shape)}"
        )
    if value.device != q.device:
        raise ValueError(
            f"must has to share the device of q, but it is on {value.device} and q is on {q.device}"
        )
    if mask is None or mask.allowed is not None or torch.compiler.is_compiling():
        return
    if value.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    if bool((value & ~mask.matrix(grid.num_tiles, q.device)[0]).any()):
        raise ValueError(
            "must has to lie inside of mask, but it forces tiles that the rule does not let their "
            "query tiles choose"
        )
