# SPDX-License-Identifier: Apache-2.0
"""What several runs say together: kinds in order, seeds beside each other, laws of loss over FLOPs.

Runs are put together where all settings but kind, size, seed and length are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rich.table import Table

from vsa.cli.train.fits import Law, Point, fit, frontier
from vsa.cli.train.table import difference, until

Row = Mapping[str, Any]
RECIPE = (
    *("grid", "topk", "batch", "learning_rate", "warmup", "weight_decay", "clip_norm", "times"),
    *("clips", "real", "held_out", "ema", "dtype", "start", "dense_steps", "ramp_every"),
    "ramp_step",
)
"""Settings that must be the same for runs to be compared; "cuts" too, which older runs lack."""
BASE = "full"
"""The kind that others are compared with."""


@dataclass(frozen=True)
class Curve:
    """One kind, size and seed.

    Attributes:
        kind: of attention.
        size: of the model.
        seed: of the run.
        rows: its evaluations but the first, by rising step.
        warmup: steps in which the learning rate rose.
    """

    kind: str
    size: str
    seed: int
    rows: tuple[Row, ...]
    warmup: int

    @property
    def trained(self) -> list[Point]:
        """FLOPs and loss of all evaluations after the learning rate has risen."""
        return [(r["flops"], r["held_out"]) for r in self.rows if r["step"] > self.warmup]


@dataclass(frozen=True)
class Group:
    """Curves that may be compared.

    Attributes:
        recipe: what they have in common, by name.
        curves: of every kind, size and seed.
    """

    recipe: Mapping[str, Any]
    curves: tuple[Curve, ...]

    @property
    def kinds(self) -> list[str]:
        """In the order of the files."""
        return list(dict.fromkeys(curve.kind for curve in self.curves))

    @property
    def sizes(self) -> list[str]:
        """Likewise."""
        return list(dict.fromkeys(curve.size for curve in self.curves))

    def of(self, kind: str, size: str) -> dict[int, Curve]:
        """Curves by seed; of two of the same seed, the longer one."""
        found: dict[int, Curve] = {}
        for curve in self.curves:
            if (curve.kind, curve.size) == (kind, size):
                known = found.get(curve.seed)
                if known is None or known.rows[-1]["step"] < curve.rows[-1]["step"]:
                    found[curve.seed] = curve
        return found


def groups(runs: Sequence[Mapping[str, Any]]) -> list[Group]:
    """Runs that may be compared, together; those that have trained nothing are left out.

    Args:
        runs: what ``provenance.read`` gave of their files.

    Raises:
        KeyError: a file of another command.
    """
    found: dict[str, list[Curve]] = {}
    recipes = {}
    for run in runs:
        recipe = {name: run[name] for name in RECIPE} | {"cuts": run.get("cuts", 0)}
        for kind in run["kinds"]:
            rows = tuple(row for row in run["rows"] if row["kind"] == kind and row["step"])
            if rows:
                recipes[str(recipe)] = recipe
                curve = Curve(kind, run["size"], run["seed"], rows, run["warmup"])
                found.setdefault(str(recipe), []).append(curve)
    return [Group(recipes[key], tuple(curves)) for key, curves in found.items()]


def last_common_step(curves: Sequence[Curve]) -> int | None:
    """The last step at which all of them were evaluated."""
    steps = [{row["step"] for row in curve.rows} for curve in curves]
    return max(set.intersection(*steps), default=None)


def tables(runs: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """Order of the kinds for each size, and laws."""
    for group in groups(runs):
        for size in group.sizes:
            if len([kind for kind in group.kinds if group.of(kind, size)]) > 1 or any(
                len(group.of(kind, size)) > 1 for kind in group.kinds
            ):
                yield order_table(group, size)
        if any(law for law in laws(group).values()):
            yield law_table(group)


def order_table(group: Group, size: str) -> Table:
    """Kinds of one size by their loss at the last step that all have, seeds put together."""
    kinds = {kind: group.of(kind, size) for kind in group.kinds if group.of(kind, size)}
    every = [curve for of_kind in kinds.values() for curve in of_kind.values()]
    step = last_common_step(every)
    table = Table(title=f"{size}, {_grid(group)}: kinds by loss", title_justify="left")
    table.caption_justify = "left"
    if step is None:
        table.caption = "There is no step at which all of these runs were evaluated."
        return table
    table.add_column("kind")
    for column in (
        *("seeds", f"loss at step {step:,}", "range"),
        *(f"less that of {BASE}, same seeds", f"seed spread of {BASE}"),
        f"fewer FLOPs to {BASE}'s loss",
    ):
        table.add_column(column, justify="right")
    at = {
        kind: {seed: _at(curve, step) for seed, curve in of_kind.items()}
        for kind, of_kind in kinds.items()
    }
    base = at.get(BASE, {})
    pairs = {
        kind: [(row, base[seed]) for seed, row in rows.items() if seed in base]
        for kind, rows in at.items()
    }
    for kind in sorted(kinds, key=lambda kind: _rank(at[kind], pairs[kind], bool(base))):
        losses = [row["held_out"] for row in at[kind].values()]
        found = [_saved(kinds[kind][seed], base[seed]) for seed in at[kind] if seed in base]
        saved = [ratio for ratio in found if ratio is not None]
        others = kind != BASE
        table.add_row(
            kind,
            ", ".join(map(str, sorted(at[kind]))),
            f"{fmean(losses):.4f}",
            _range(losses, "{:.4f}"),
            _apart(pairs[kind]) if others else "",
            _against_spread(pairs[kind], base) if others else "",
            f"{fmean(saved):.2f}x {_range(saved, '{:.2f}x')}".strip() if saved and others else "",
        )
    table.caption = (
        f"In the order of the difference to {BASE} of the same seeds, for seeds also decide which "
        "clips are held out. Ranges are over seeds; a ± is the standard error over the held-out "
        f"clips of one seed. Seed spread: whether the mean difference is larger than {BASE}'s own "
        f"range. FLOPs: to the loss that {BASE} has at this step, interpolated between "
        "evaluations; empty where that loss is not reached."
    )
    return table


def _rank(rows: Mapping[int, Row], pairs: Sequence[tuple[Row, Row]], base: bool) -> float:
    """What kinds are put in order by; those that share no seed with the base come last."""
    if not base:
        return fmean(row["held_out"] for row in rows.values())
    differences = [mine["held_out"] - theirs["held_out"] for mine, theirs in pairs]
    return fmean(differences) if differences else float("inf")


def _against_spread(pairs: Sequence[tuple[Row, Row]], base: Mapping[int, Row]) -> str:
    """Whether a difference is larger than what another seed changes in the base."""
    losses = [row["held_out"] for row in base.values()]
    if not pairs or len(losses) < 2:
        return "one seed" if base else ""
    spread = max(losses) - min(losses)
    apart = abs(fmean(mine["held_out"] - theirs["held_out"] for mine, theirs in pairs))
    return f"{'within' if apart <= spread else 'beyond'} {spread:.4f}"


def laws(group: Group) -> dict[str, Law | None]:
    """A law of each kind, through the frontier of all its sizes."""
    return {kind: fit(kind_frontier(group, kind)) for kind in group.kinds}


def kind_frontier(group: Group, kind: str) -> list[Point]:
    """Least losses of a kind over FLOPs, whatever the size; seeds averaged step by step."""
    points: list[Point] = []
    for size in group.sizes:
        of_seeds = list(group.of(kind, size).values())
        if not of_seeds:
            continue
        steps = set.intersection(*({r["step"] for r in curve.rows} for curve in of_seeds))
        for step in sorted(step for step in steps if step > of_seeds[0].warmup):
            rows = [_at(curve, step) for curve in of_seeds]
            points.append((fmean(r["flops"] for r in rows), fmean(r["held_out"] for r in rows)))
    return frontier(points)


def law_table(group: Group) -> Table:
    """The laws, what they were fitted to, and FLOPs at equal loss."""
    found = laws(group)
    sizes = group.sizes
    table = Table(
        title=f"Loss over FLOPs, {_grid(group)}: {', '.join(sizes)}", title_justify="left"
    )
    table.caption_justify = "left"
    for column in (
        "kind",
        "sizes",
        "points",
        "FLOPs",
        "law",
        "off by",
        f"FLOPs, {BASE}'s over its",
    ):
        table.add_column(column, justify="left" if column in ("kind", "law") else "right")
    for kind, law in found.items():
        own = [size for size in sizes if group.of(kind, size)]
        if law is None:
            table.add_row(kind, str(len(own)), str(len(kind_frontier(group, kind))), "", "too few")
            continue
        table.add_row(
            kind,
            str(len(own)),
            str(law.points),
            "{:.1e} to {:.1e}".format(*law.flops),
            str(law),
            f"{law.error:.2%}",
            "" if kind == BASE else _equal_loss(found.get(BASE), law),
        )
    what = (
        "Fitted to the frontier of all sizes: evaluations after warmup that no other of the kind "
        "beats with fewer FLOPs, seeds averaged. "
        if len(sizes) > 1
        else "One size: this describes a training curve, and says nothing about larger models. "
    )
    table.caption = (
        f"{what}A law describes the FLOPs that it stands beside and is not to be carried beyond "
        "them; the rate of learning is constant and the same for all sizes. The floor is only "
        "there where the points justify it. Off by: root mean square, relative. The last column "
        "is at the highest and the lowest loss that both laws cover."
    )
    return table


def _equal_loss(base: Law | None, law: Law) -> str:
    """How many times the FLOPs of the base are at the ends of the losses that both cover."""
    if base is None:
        return ""
    high = min(each.loss(each.flops[0]) for each in (base, law))
    low = max(each.loss(each.flops[1]) for each in (base, law))
    if low >= high:
        return "no loss in common"
    ratios = []
    for loss in (high, low):
        both = base.flops_for(loss), law.flops_for(loss)
        if both[0] is not None and both[1] is not None:
            ratios.append(f"{both[0] / both[1]:.2f}x at {loss:.4f}")
    return ", ".join(ratios)


def _at(curve: Curve, step: int) -> Row:
    return next(row for row in curve.rows if row["step"] == step)


def _saved(curve: Curve, base: Row) -> float | None:
    """How many times fewer FLOPs a curve takes to the loss of a row of the base."""
    reached = until(curve.rows, base["held_out"])
    return None if reached is None else base["flops"] / reached[0]


def _apart(pairs: Sequence[tuple[Row, Row]]) -> str:
    """Differences of pairs of one seed each: the mean, and what is known of its spread."""
    if not pairs:
        return ""
    if len(pairs) == 1 and all("held_out_clips" in row for row in pairs[0]):
        return "{:+.4f} ± {:.4f}".format(*difference(*pairs[0]))
    each = [mine["held_out"] - theirs["held_out"] for mine, theirs in pairs]
    return f"{fmean(each):+.4f} {_range(each, '{:+.4f}')}".strip()


def _range(values: Sequence[float], form: str) -> str:
    if len(values) < 2:
        return ""
    return f"({form.format(min(values))} to {form.format(max(values))})"


def _grid(group: Group) -> str:
    return f"{'x'.join(map(str, group.recipe['grid']))} tokens"
