# SPDX-License-Identifier: Apache-2.0
"""What bench/recall.py measures of a layer: mass recall, and the error of the output.

    recall  share of dense attention on the kept tiles, the mean over query tiles
    error   |out - dense| / |dense|, over all tokens of a head, dense in fp64 of the same q, k and v

    loss    held-out loss of the whole model where all of its layers keep tiles in this way

With gates, both outputs are gate_fine * fine + gate_coarse * coarse: what leaving tiles out changes
in the model's own attention.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

import vsa
from recall_sources import Clip, Layer, Source
from vsa.diagnostics import Curves
from vsa.diagnostics.curves import Order
from vsa.diagnostics.dense import weight_slices
from vsa.measure import timing
from vsa.values import checks
from vsa.values.grid import SLOTS

ORACLE = "oracle"
"""Tiles by their true mass, which no score knows beforehand."""
UNIFORM = "uniform"
AIMS: dict[str, Any] = {
    "calibrated": "worst",
    "calibrated, mean": "mean",
    "calibrated, error": "error",
}
"""Budgets per head by name, and what ``vsa.calibrate`` aims at for them."""
Budgets = dict[tuple[str, float], dict[str, vsa.Budgets]]
"""By score and mean budget, then by a name of ``AIMS``."""
REPEATS = 5
"""Of what is timed."""


SCORES: dict[str, Order] = {"mean": "mean", "sub-blocks 4": vsa.SubBlocks(4), ORACLE: "oracle"}
"""What tiles are ordered by, by the names in figures."""


def tails() -> tuple[bool, ...]:
    """Whether what was left out enters the softmax by its means, as far as this version can."""
    return (False, True) if "tail" in vsa.functional.FineOptions.__annotations__ else (False,)


class Way(NamedTuple):
    """One way of choosing and using tiles.

    Attributes:
        score: a name of ``scores``.
        heads: "uniform", or what budgets of heads aim at: see ``AIMS``.
        topk: share of the tiles, the mean over heads.
        tail: whether the tiles left out enter the softmax by their means.
        gates: whether the output is the model's, behind its gates.
    """

    score: str
    heads: str
    topk: float
    tail: bool
    gates: bool


@dataclass(frozen=True, eq=False)
class Measured:
    """Of all heads: the mean over clips.

    Attributes:
        recall: (layers, heads) fp64 on the CPU.
        error: likewise.
    """

    recall: Tensor
    error: Tensor


def calibrated(
    source: Source, topks: list[float], tiles: int, heard: Callable[[], object]
) -> Budgets:
    """Budgets per layer and head by score and mean budget, from the clips for calibration."""
    curves: dict[str, Curves] = {}
    for clip in source.calibration:
        for name, score in SCORES.items():
            if name not in curves:
                curves[name] = Curves(list(clip), tiles=tiles, score=score)
            for layer, x in clip.items():
                curves[name].note(layer, x.q, x.k, x.v, grid=source.grid, gate_fine=x.gate_fine)
        heard()
    found: Budgets = {}
    for name, of_score in curves.items():
        for topk in topks:
            of_topk = found.setdefault((name, topk), {})
            for heads, aim in AIMS.items():
                budgets = vsa.calibrate(of_score, topk, aim=aim)
                assert isinstance(budgets, vsa.Budgets)
                of_topk[heads] = budgets
    return found


def measured(
    source: Source,
    budgets: Budgets,
    heard: Callable[[], object],
) -> dict[Way, Measured]:
    """Every way on every held-out clip."""
    sums: dict[Way, Any] = defaultdict(float)
    clips = 0
    for clip in source.held_out:
        for place, (name, layer) in enumerate(clip.items()):
            of_layer = {
                key: {heads: budget.of(name) for heads, budget in each.items()}
                for key, each in budgets.items()
            }
            for way, numbers in _ways(layer, source.grid, of_layer):
                if place == 0 and clips == 0:
                    sums[way] = numbers.new_zeros(len(clip), *numbers.shape)
                sums[way][place] += numbers
        clips += 1
        heard()
    return {way: Measured(*(total / clips).cpu().unbind(1)) for way, total in sums.items()}


@torch.no_grad()
def _ways(
    layer: Layer, grid: vsa.Grid, budgets: Mapping[tuple[str, float], dict[str, vsa.LayerBudget]]
) -> Iterator[tuple[Way, Tensor]]:
    """Ways and what they came to: recall and error of each head, (2, heads) fp64."""
    mass, dense = dense_attention(layer, grid)
    coarse = None if layer.gate_coarse is None else _coarse(layer, grid)
    gated = dense if coarse is None else with_gates(layer, dense, coarse)
    for (score, topk), calibrated in budgets.items():
        count = checks.top_k(topk, grid.num_tiles)
        uniform = vsa.LayerBudget((count,) * layer.q.shape[2], grid.num_tiles)
        for heads, each in {UNIFORM: uniform, **calibrated}.items():
            chosen = selection(layer, grid, each, score, mass)
            recall = (mass * chosen.mask()).sum(-1).mean((0, 2))
            for tail in tails():
                options: Any = {"tail": tail} if tail else {}
                q, k, v = layer.q, layer.k, layer.v
                out = vsa.block_sparse_attention(q, k, v, chosen, grid=grid, **options).double()
                yield (
                    Way(score, heads, topk, tail, False),
                    torch.stack((recall, _distance(out, dense))),
                )
                if coarse is not None:
                    error = _distance(with_gates(layer, out, coarse), gated)
                    yield Way(score, heads, topk, tail, True), torch.stack((recall, error))


def selection(
    layer: Layer, grid: vsa.Grid, budget: vsa.LayerBudget, score: str, mass: Tensor
) -> vsa.Selection:
    """The tiles of a budget by a score."""
    if score != ORACLE:
        options: Any = {} if score == "mean" else {"score": SCORES[score]}
        return vsa.select(layer.q, layer.k, budget, grid=grid, **options)
    order = mass.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank.scatter_(-1, order, torch.arange(grid.num_tiles, device=mass.device).expand_as(order))
    counts = torch.tensor(budget.counts, device=mass.device)[:, None, None]
    return vsa.Selection.from_mask(rank < counts, grid)


def dense_attention(layer: Layer, grid: vsa.Grid) -> tuple[Tensor, Tensor]:
    """Dense attention in fp64.

    Returns:
        mass: (B, heads, n, n), the share of each key tile, the mean over a query tile's tokens.
        out: (B, S, heads, head_dim).
    """
    q, k, v = (x.double() for x in (layer.q, layer.k, layer.v))
    token = grid.tokens_of_tiles(q.device)
    values = v[:, token.clamp(min=0).flatten()]
    (batch, _, heads, head_dim), (n, slots) = q.shape, token.shape
    group = heads // v.shape[2]
    mass = q.new_empty(batch, heads, n, n)
    out = q.new_zeros(batch, n, SLOTS, heads, head_dim)
    for part in weight_slices(q, k, grid):
        mass[part.batch, part.head, part.rows] = part.mass
        rows = part.weights @ values[part.batch, :, part.head // group]
        out[part.batch, part.rows, :slots, part.head] = rows.view(-1, slots, head_dim)
    return mass, grid.from_tiles(out)


def with_gates(layer: Layer, fine: Tensor, coarse: Tensor) -> Tensor:
    """The model's output, fp64: both branches behind their gates."""
    assert layer.gate_coarse is not None
    gated = fine if layer.gate_fine is None else layer.gate_fine.double() * fine
    return gated + layer.gate_coarse.double() * coarse


def _coarse(layer: Layer, grid: vsa.Grid) -> Tensor:
    """Attention between tile means in fp64, for every token; (B, S, heads, head_dim)."""
    sizes = grid.tile_sizes(layer.q.device)[:, None, None]
    q, k, v = (
        (grid.to_tiles(x.double()).sum(2) / sizes).transpose(1, 2)
        for x in (layer.q, layer.k, layer.v)
    )
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(1, 2)[:, grid.tile_of_token(q.device)]


def _distance(out: Tensor, dense: Tensor) -> Tensor:
    """Relative L2 of every head, the mean over the batch; (heads,)."""
    norms = [x.square().sum((1, 3)).sqrt() for x in (out - dense, dense)]
    return (norms[0] / norms[1]).mean(0)


def losses(
    source: Source, budgets: Budgets, heard: Callable[[], object]
) -> tuple[dict[Way, Tensor], dict[str, Tensor]]:
    """Held-out loss of the model by way, behind its gates if it has some.

    Returns:
        Losses (clips,) by way, none for the oracle; and of the model as it was trained and with
        all tiles.
    """
    trained = source.trained
    model = None if trained is None else trained.sparse()
    if trained is None or model is None:
        return {}, {}
    gates = model.layers[0].attention.to_gate_compress is not None
    found = {}
    whole = {"trained": trained.loss(trained.model), "every tile": trained.loss(model)}
    for (score, topk), budget in budgets.items():
        if score == ORACLE:
            continue
        for heads, tail in product((UNIFORM, *AIMS), tails()):
            for block in model.layers:
                if score != "mean":
                    block.attention.score = SCORES[score]
                if tail:
                    block.attention.tail = True
            if heads == UNIFORM:
                model.set_topk(topk)
            else:
                budget[heads].apply_to(model)
            found[Way(score, heads, topk, tail, gates)] = trained.loss(model)
            for block in model.layers:
                for name, plain in (("score", "mean"), ("tail", False)):
                    if hasattr(block.attention, name):
                        setattr(block.attention, name, plain)
        heard()
    return found, whole


def timed(
    clip: Clip, grid: vsa.Grid, budgets: Mapping[str, vsa.LayerBudget], score: str
) -> float | None:
    """Milliseconds of ``vsa.attention`` in all layers together; None on a CPU."""
    device = next(iter(clip.values())).q.device
    if device.type != "cuda" or score == ORACLE:
        return None
    options: Any = {} if score == "mean" else {"score": SCORES[score]}

    @torch.no_grad()
    def layers() -> None:
        for name, x in clip.items():
            vsa.attention(x.q, x.k, x.v, budgets[name], grid=grid, **options)

    each = timing.seconds(layers, device, REPEATS)
    return 1e3 * sorted(each)[REPEATS // 2]
