# SPDX-License-Identifier: Apache-2.0
"""What eight bits change in every head of a model, so that layers that mind can stay native."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from vsa.diagnostics.curves import SAMPLED_TILES
from vsa.diagnostics.metrics import whole_tiles
from vsa.functional import block_sparse_attention
from vsa.values import checks
from vsa.values.grid import Grid
from vsa.values.precision import PRECISIONS, Precision
from vsa.values.selection import Selection, check_is_selection

FASTEST: tuple[Precision, ...] = ("fp8", "int8")
"""Precisions that are not native, the fastest first."""
_LEAST = 1e-30
Key = tuple[str, int, Precision]
"""Layer, step and precision."""


class PrecisionErrors:
    """Error of low precision by layer, step and head: |out - native| / |native|, Euclidean norms.

    Of the fine stage over the tiles that a layer attends, measured for a few query tiles that are
    spread over the video, and their attention to the video alone. Nothing here waits for the device
    before the numbers are read.

    Args:
        layers: their names.
        precisions: which are measured, of "int8" and "fp8".
        tiles: query tiles that are measured, spread evenly over those that are whole.
        backend: what computes, as in ``vsa.attention``. By default the simulation, which any device
            runs; "auto" takes the kernels of a Hopper GPU.

    Attributes:
        grid: the video's tokens and tiles, known from the first note on.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    def __init__(
        self,
        layers: Sequence[str],
        *,
        precisions: Sequence[Precision] = FASTEST,
        tiles: int = SAMPLED_TILES,
        backend: str = "torch",
    ) -> None:
        checks.not_empty("layers", layers := list(layers))
        if len(set(layers)) < len(layers):
            raise ValueError(f"layers must have names of their own, but they are {layers!r:.80}")
        self.layers = layers
        self.precisions = checked(precisions)
        self.tiles = checks.integer("tiles", tiles, at_least=1)
        self.backend = backend
        self.grid: Grid | None = None
        self._squares: dict[Key, tuple[Tensor, Tensor]] = {}
        self._worst: dict[Key, Tensor] = {}

    @torch.no_grad()
    def note(
        self, layer: str, q: Tensor, k: Tensor, v: Tensor, *, selection: Selection, step: int = 0
    ) -> None:
        """Measure one call of a layer; several of one step are taken together.

        Args:
            layer: its name.
            q: (B, S, heads, head_dim) bf16 or fp16, after the rotary embedding, text included where
                the grid has some.
            k: (B, S, kv_heads, head_dim); kv_heads divides heads.
            v: like k.
            selection: what this layer attends; it knows the one grid of queries and keys.
            step: number of the denoising step.

        Raises:
            ValueError: another layer, a selection without a grid, or another grid or number of
                heads than before.
            TypeError: tensors of another type.
        """
        if layer not in self.layers:
            raise ValueError(f"layer must be one of {self.layers!r:.80}, but it is {layer!r}")
        check_is_selection(selection)
        if selection.grid is None or selection.grid != selection.kv_grid:
            raise ValueError(
                "selection must know one grid for queries and keys for tiles to be sampled: pass "
                "grid= to Selection.from_mask"
            )
        video = replace(selection.grid, prefix=0, suffix=0)
        if self.grid not in (None, video):
            raise ValueError(
                f"selection is for the grid {video.shape} in tiles of {video.tile}, but these "
                f"errors are of {self.grid.shape} in tiles of {self.grid.tile}: make one for each "
                "video"
            )
        for name, x in (("q", q), ("k", k), ("v", v)):
            selection.grid.check_length(name, checks.tensor(name, x).shape[1])
        heads = [len(old[0]) for (name, *_), old in self._squares.items() if name == layer]
        if heads and q.shape[2] != heads[0]:
            raise ValueError(
                f"q must have {heads[0]} heads as before, but it has {q.shape[2]} in {layer!r}"
            )
        chosen, tokens = whole_tiles(video, self.tiles, q.device)
        count, size = tokens.shape
        queries = Grid((count, 1, size), tile=(1, 1, size))
        rows = selection.bitmap[:, :, chosen].contiguous()
        sample = Selection(rows, selection.num_key_tiles, queries, video, selection.most)
        first = selection.grid.prefix
        q = q[:, first + tokens.flatten()]
        k, v = (x[:, first : first + video.tokens] for x in (k, v))

        def attend(precision: Precision) -> Tensor:
            """(B, tiles, tokens, heads, head_dim)."""
            out = block_sparse_attention(q, k, v, sample, precision=precision, backend=self.backend)
            return out.double().unflatten(1, (count, size))

        found = {each: attend(each) for each in self.precisions}  # which may refuse
        native = attend("native")
        self.grid = video
        whole = native.square().sum((2, 4))  # (B, tiles, heads)
        for each, out in found.items():
            at = layer, step, each
            off = (out - native).square().sum((2, 4))
            new = off.sum((0, 1)), whole.sum((0, 1))
            worst = (off / whole.clamp(min=_LEAST)).sqrt().amax((0, 1))
            if at in self._squares:
                before, worst_before = self._squares[at], self._worst[at]
                new = before[0] + new[0], before[1] + new[1]
                worst = torch.maximum(worst, worst_before)
            self._squares[at], self._worst[at] = new, worst

    @property
    def steps(self) -> list[int]:
        """The steps of which something was noted."""
        return sorted({step for _, step, _ in self._squares})

    def of(self, precision: Precision, steps: Sequence[int] | None = None) -> Tensor:
        """The error of every head, (layers, heads) fp64 on the CPU; NaN where nothing was noted.

        Args:
            precision: one of those measured.
            steps: which of them; None for all.

        Raises:
            ValueError: another precision, or nothing noted.
        """

        def error(at: list[Key]) -> Tensor:
            off, whole = (
                torch.stack([x.cpu() for x in each]).sum(0)
                for each in zip(*(self._squares[key] for key in at), strict=True)
            )
            return (off / whole.clamp(min=_LEAST)).sqrt()

        return self._table(precision, steps, error)

    def worst_tile(self, precision: Precision, steps: Sequence[int] | None = None) -> Tensor:
        """The largest error of a query tile, as ``of``."""
        return self._table(
            precision,
            steps,
            lambda at: torch.stack([self._worst[key].cpu() for key in at]).amax(0),
        )

    def choose(self, at_most: float, *, aim: Literal["worst", "mean"] = "worst") -> list[Precision]:
        """A precision for every layer: ``precision`` of ``apply_vsa``.

        The fastest of those measured whose error stays within a bound; "native" for layers in which
        none does, and for those of which nothing was noted.

        Args:
            at_most: the bound, in (0, 1]. N(0,1) inputs have 0.041 in int8 and 0.055 in fp8.
            aim: what stays within it: "worst", the worst head of a layer, or "mean", the mean over
                its heads.

        Raises:
            ValueError, TypeError: naming the argument, or nothing noted.
        """
        checks.share("at_most", at_most)
        if aim not in ("worst", "mean"):
            raise ValueError(f'aim must be "worst" or "mean", but it is {aim!r}')
        found: list[Precision] = ["native"] * len(self.layers)
        for each in reversed([each for each in FASTEST if each in self.precisions]):
            errors = self.of(each)
            of_layers = errors.amax(-1) if aim == "worst" else errors.mean(-1)
            for layer, error in enumerate(of_layers.tolist()):
                if error <= at_most:  # NaN is not
                    found[layer] = each
        return found

    def _table(
        self, precision: Precision, steps: Sequence[int] | None, of: Callable[[list[Key]], Tensor]
    ) -> Tensor:
        """(layers, heads) from what was noted of each layer."""
        if precision not in self.precisions:
            raise ValueError(
                f"precision must be one of {', '.join(map(repr, self.precisions))}, which were "
                f"measured, but it is {precision!r:.60}"
            )
        wanted = self.steps if steps is None else list(steps)
        keys = [[(layer, step, precision) for step in wanted] for layer in self.layers]
        at = [[key for key in of_layer if key in self._squares] for of_layer in keys]
        if not any(at):
            raise ValueError(
                f"nothing was noted in the steps {wanted}: run the model inside of collect or "
                "watch_precision, or call note"
            )
        found = [of(each) if each else None for each in at]
        nothing = torch.full_like(next(x for x in found if x is not None), math.nan)
        return torch.stack([nothing if x is None else x for x in found])


# What torch.compiler.disable sets. The decorator itself would load torch._dynamo, as long as torch.
PrecisionErrors.note._torchdynamo_disable = True  # type: ignore[attr-defined]


def checked(precisions: object) -> tuple[Precision, ...]:
    """Some that are not native, each once.

    Raises:
        ValueError, TypeError: anything else.
    """
    if not isinstance(precisions, (list, tuple)) or not precisions:
        raise TypeError(
            f"precisions must be a list of {' and '.join(map(repr, FASTEST))}, but it is "
            f"{precisions!r:.60}"
        )
    for each in precisions:
        if each not in PRECISIONS or each == "native":
            raise ValueError(
                f"precisions must be of {' and '.join(map(repr, FASTEST))}, but one is {each!r:.60}"
            )
    return tuple(dict.fromkeys(precisions))
