# SPDX-License-Identifier: Apache-2.0
"""What every head of a layer keeps with one tile, with two, with all: recall and output error.

The dense attention of a query tile is added up by key tile, exactly, and the key tiles are put in
the order in which they would be chosen. The running sum is recall at every number of tiles at once.
Where values are told too, so is the error of the attention output (``output_error``). Both are
measured for a few query tiles, spread over the video, and averaged over them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, cast

import torch
from torch import Tensor

from vsa.backends import torch_coarse, torch_sub_blocks
from vsa.diagnostics.dense import tile_mass
from vsa.diagnostics.metrics import whole_tiles
from vsa.diagnostics.output_error import error_by_count
from vsa.stages.inputs import check_text_valid
from vsa.values import checks
from vsa.values.grid import Grid
from vsa.values.score import Score, runs_of

SAMPLED_TILES = 16
"""Query tiles that are measured, unless asked otherwise."""
Order = Score | Literal["oracle"]
"""What tiles can be ordered by: a score, or their own share of dense attention ("oracle"), which no
score can know and none can be above."""


class Curves:
    """Recall and output error at every budget by layer, step and head; means of what was noted.

    Nothing here waits for the device before the numbers are read.

    Args:
        layers: their names.
        tiles: query tiles that are measured, spread evenly over those that are whole.
        score: what the key tiles are ordered by, as in ``vsa.attention``; or "oracle", by what
            they hold, which is the most that any score can reach.

    Attributes:
        grid: the video's tokens and tiles, known from the first note on.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    def __init__(
        self, layers: Sequence[str], *, tiles: int = SAMPLED_TILES, score: Order = "mean"
    ) -> None:
        checks.not_empty("layers", layers := list(layers))
        if len(set(layers)) < len(layers):
            raise ValueError(f"layers must have names of their own, but they are {layers!r:.80}")
        self.layers = layers
        self.tiles = checks.integer("tiles", tiles, at_least=1)
        check_score(score)
        self.score = score
        self.grid: Grid | None = None
        self._sums: dict[tuple[str, int], tuple[Tensor, int]] = {}
        self._errors: dict[tuple[str, int], Tensor | None] = {}

    @torch.no_grad()
    def note(
        self,
        layer: str,
        q: Tensor,
        k: Tensor,
        v: Tensor | None = None,
        *,
        grid: Grid,
        step: int = 0,
        gate_fine: Tensor | None = None,
        text_valid: Tensor | None = None,
    ) -> None:
        """Measure one call of a layer; several of one step are averaged.

        Args:
            layer: its name.
            q: (B, S, heads, head_dim), after the rotary embedding, text included where the grid
                has some.
            k: (B, S, kv_heads, head_dim); kv_heads divides heads.
            v: like k; None notes recall alone, from which ``vsa.calibrate`` cannot aim at the
                error of the output.
            grid: of all of them.
            step: number of the denoising step.
            gate_fine: the factor of the attention output that the model applies, broadcastable to
                q; the error is measured behind it.
            text_valid: (B, prefix + suffix) bool, which text tokens are real; None for all.

        Raises:
            ValueError: another layer, or another grid or number of heads than before, or values for
                some of a layer's calls in a step alone.
        """
        if layer not in self.layers:
            raise ValueError(f"layer must be one of {self.layers!r:.80}, but it is {layer!r}")
        video = replace(grid, prefix=0, suffix=0)
        if self.grid not in (None, video):
            raise ValueError(
                f"grid is {grid.shape} in tiles of {grid.tile}, but these curves are of "
                f"{self.grid.shape} in tiles of {self.grid.tile}: calibrate for each video size"
            )
        for name, x in (("q", q), ("k", k), ("v", k if v is None else v)):
            checks.tensor(name, x)
            grid.check_length(name, x.shape[1])
        checks.keys_match(q, k, k if v is None else v)
        checks.gate("gate_fine", gate_fine, q)
        if text_valid is not None:
            check_text_valid(text_valid, q, grid, grid)
        before, count = self._sums.get((layer, step), (None, 0))
        if before is not None and len(before) != q.shape[2]:
            raise ValueError(
                f"q must have {len(before)} heads as before, but it has {q.shape[2]} in {layer!r}"
            )
        earlier = self._errors.get((layer, step))
        if before is not None and (earlier is None) != (v is None):
            was = "was not" if earlier is None else "was"
            raise ValueError(f"v must be given as in the step's other calls, but it {was} there")
        with torch.autocast(q.device.type, enabled=False):  # which would round the products
            new, error = self._measure(q, k, v, grid, gate_fine, text_valid)
        self.grid = video
        self._sums[layer, step] = (new if before is None else before + new, count + 1)
        self._errors[layer, step] = error if earlier is None or error is None else earlier + error

    def _measure(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        grid: Grid,
        gate: Tensor | None,
        text_valid: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Recall and error of a call, (heads, n) each; an error as ``error_of`` gives it."""
        chosen = whole_tiles(grid, self.tiles, q.device)[0]
        mass, order = _mass_in_order(q, k, grid, chosen, self.score)
        recall = mass.cumsum(-1).mean((0, 2))
        if v is None:
            return recall, None
        gate = None if gate is None else gate.expand_as(q)
        errors, norms = error_by_count(
            q, k, v, grid, order, chosen=chosen, gate=gate, text_valid=text_valid
        )
        whole = norms.sum()  # no output at all has no error
        return recall, errors.sum(0) / torch.where(whole == 0, 1, whole)

    @property
    def steps(self) -> list[int]:
        """The steps of which something was noted."""
        return sorted({step for _, step in self._sums})

    def noted(self) -> list[str]:
        """The layers of which something was noted, in their order."""
        found = {layer for layer, _ in self._sums}
        return [layer for layer in self.layers if layer in found]

    def of(self, layer: str, steps: Sequence[int] | None = None) -> Tensor:
        """Recall with 1 to n tiles, (heads, n) fp64 on the CPU; the mean over steps.

        Raises:
            ValueError: nothing noted of this layer in these steps.
        """
        means = self._mean(layer, steps, {key: total for key, (total, _) in self._sums.items()})
        return means / means[:, -1:]  # all tiles keep everything, whatever was rounded

    def error_of(self, layer: str, steps: Sequence[int] | None = None) -> Tensor:
        """Squared error of the output with 1 to n tiles, (heads, n) fp64 on the CPU.

        It is relative to the layer: |out_n - out|^2 of a head over |out|^2 of all heads together,
        so that the sum over heads is the squared relative error of the layer's attention output.
        The mean over calls and steps.

        Raises:
            ValueError: nothing noted of this layer in these steps, or without v.
        """
        noted = {key: error for key, error in self._errors.items() if error is not None}
        if self.has_errors(layer, steps):
            return self._mean(layer, steps, noted)
        self._mean(layer, steps, {key: total for key, (total, _) in self._sums.items()})
        raise ValueError(
            f"source must have noted layer {layer!r} with its values for output errors, but there "
            "it has queries and keys alone: pass v to Curves.note"
        )

    def has_errors(self, layer: str, steps: Sequence[int] | None = None) -> bool:
        """Whether all that was noted of a layer in some steps was noted with values."""
        wanted = self.steps if steps is None else steps
        found = [(layer, step) for step in wanted if (layer, step) in self._sums]
        return bool(found) and all(self._errors[key] is not None for key in found)

    def _mean(
        self, layer: str, steps: Sequence[int] | None, sums: Mapping[tuple[str, int], Tensor]
    ) -> Tensor:
        """The mean over steps of what was added up in each."""
        wanted = self.steps if steps is None else steps
        found = [(layer, step) for step in wanted if (layer, step) in sums]
        if not found:
            raise ValueError(f"nothing was noted of layer {layer!r} in the steps {list(wanted)}")
        means = torch.stack([sums[key].double().cpu() / self._sums[key][1] for key in found])
        if not means.isfinite().all():
            raise ValueError(
                f"source must have noted finite numbers, but in layer {layer!r} some are not: its "
                "q, k, v or gate hold NaN or infinity"
            )
        return means.mean(0)


def check_score(score: object) -> None:
    """A score that tiles can be ordered by.

    Raises:
        ValueError, TypeError: another one.
    """
    if score != "oracle":
        runs_of(score)


def recall_by_count(
    q: Tensor, k: Tensor, grid: Grid, *, tiles: int | None = None, score: Order = "mean"
) -> Tensor:
    """Share of dense attention to the video with 1 to n tiles, chosen by a score.

    Args:
        q: (B, S, heads, head_dim), text included where the grid has some.
        k: (B, S, kv_heads, head_dim).
        grid: of both.
        tiles: query tiles that are measured; None for all, clipped ones included.
        score: what the key tiles are ordered by.

    Returns:
        (B, heads, n), the mean over query tiles; fp32 (fp64 for fp64 inputs).
    """
    chosen = None if tiles is None else whole_tiles(grid, tiles, q.device)[0]
    return _mass_in_order(q, k, grid, chosen, score)[0].cumsum(-1).mean(2)


def _mass_in_order(
    q: Tensor, k: Tensor, grid: Grid, chosen: Tensor | None, score: Order
) -> tuple[Tensor, Tensor]:
    """What key tiles hold in the order in which they are chosen, and that order.

    Returns:
        Both (B, heads, query tiles, n).
    """
    mass = tile_mass(q, k, grid, chosen)
    by_mass = isinstance(score, str) and score == "oracle"
    key = mass if by_mass else tile_scores(q, k, grid, chosen, cast("Score", score))
    order = key.argsort(dim=-1, descending=True, stable=True)
    return mass.gather(-1, order), order


def tile_scores(
    q: Tensor, k: Tensor, grid: Grid, chosen: Tensor | None = None, score: Score = "mean"
) -> Tensor:
    """What ``vsa.select`` compares, (B, heads, query tiles, n); NaN is minus infinity."""
    if runs_of(score) > 1:
        found = torch_sub_blocks.scores_of_rows(q, k, grid, runs_of(score), chosen)
        return torch.where(found.isnan(), float("-inf"), found) + 0.0
    q_means, k_means = (torch_coarse.tile_means(x, grid) for x in (q, k))
    if chosen is not None:
        q_means = q_means[:, :, chosen]
    scale = q.shape[-1] ** -0.5
    batch, heads, rows, _ = q_means.shape
    (each,) = torch_coarse.for_query_heads(q_means, k_means)
    found = torch_coarse.product(q_means.flatten(0, 1), each.flatten(0, 1), scale)
    found = torch.where(found.isnan(), float("-inf"), found) + 0.0  # -0 ties with 0
    return found.view(batch, heads, rows, -1)
