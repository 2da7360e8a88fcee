# SPDX-License-Identifier: Apache-2.0
"""Everything that decides what a run computes; two runs that share it share their numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vsa.schedule import SparsityRamp
from vsa.training.attention import ADAPTED, KINDS
from vsa.training.flow import Times
from vsa.training.model import HEAD_DIM, SIZES
from vsa.values import checks
from vsa.values.grid import Extent, Grid

BATCH_TOKENS = 16_384
"""Tokens of a step unless asked otherwise, the length of the paper's models."""


@dataclass(frozen=True)
class Settings:
    """A run's recipe.

    Attributes:
        kinds: of attention, each a model of its own.
        size: a name of ``SIZES``.
        grid: tokens along t, h, w.
        topk: key tiles per query tile, a number or a share.
        seed: of weights, data, times and noise.
        batch: clips of a step.
        learning_rate: of AdamW, constant after ``warmup`` steps.
        warmup: steps in which it rises from zero.
        weight_decay: of weights; norms, biases and modulations have none.
        clip_norm: largest norm of the gradient.
        times: how times are distributed.
        clips: generated clips that training goes round.
        real: share of real clips among those of a step, and among those held out.
        held_out: clips that are held out, filled up to whole batches.
        every: steps between two evaluations.
        ema: decay of the averaged weights that are evaluated; 0 evaluates the weights themselves.
        dense_steps: steps that ``ramp`` and ``abrupt`` are dense for.
        ramp_every: steps between two changes of ``ramp``.
        ramp_step: density lost at each change.
        dtype: "float32", or "bfloat16" for autocast.
        compiled: whether blocks are compiled.
        cuts: frames between two jumps of the camera in generated clips; 0 for none.

    Raises:
        ValueError, TypeError: naming the setting.
    """

    kinds: tuple[str, ...]
    size: str
    grid: Extent
    topk: float
    seed: int
    batch: int
    learning_rate: float
    warmup: int
    weight_decay: float
    clip_norm: float
    times: Times
    clips: int
    real: float
    held_out: int
    every: int
    ema: float
    dense_steps: int
    ramp_every: int
    ramp_step: float
    dtype: str
    compiled: bool
    cuts: int = 0  # of runs that were recorded before there were any

    def __post_init__(self) -> None:
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise ValueError(f"kinds must be of {', '.join(KINDS)}, but one is {unknown[0]!r}")
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"kinds must be named once each, but they are {list(self.kinds)}")
        if self.size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, but it is {self.size!r}")
        checks.extent("grid", self.grid)
        checks.top_k(self.topk, self.video.num_tiles)
        if self.video.is_ragged:
            whole = "x".join(map(str, self.video.tile))
            raise ValueError(
                f"grid must consist of whole tiles of {whole} tokens, but it is "
                f"{'x'.join(map(str, self.grid))}"
            )
        least = {"batch": 1, "warmup": 0, "clips": 1, "held_out": 1, "every": 1}
        for name, at_least in (least | {"dense_steps": 0, "ramp_every": 1, "cuts": 0}).items():
            checks.integer(name, getattr(self, name), at_least)
        checks.share("ramp_step", self.ramp_step)
        for name in ("learning_rate", "clip_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(
                    f"{name} must be a number above 0, but it is {getattr(self, name)}"
                )
        if not 0 <= self.real <= 1:
            raise ValueError(f"real must be a share from 0 to 1, but it is {self.real}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be a decay in [0, 1), but it is {self.ema}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, but it is {self.dtype}")

    @property
    def video(self) -> Grid:
        """The grid in tiles of 4x4x4."""
        return Grid(self.grid)

    @property
    def density(self) -> float:
        """Share of the key tiles that sparse kinds keep."""
        return checks.top_k(self.topk, self.video.num_tiles) / self.video.num_tiles

    def density_at(self, kind: str, step: int) -> float:
        """Share of the key tiles that a kind's fine stage keeps at a step; 0 where it has none."""
        if kind == "full":
            return 1.0
        if kind == "coarse":
            return 0.0
        if kind not in ADAPTED:
            return self.density
        if step < self.dense_steps:
            return 1.0
        if kind == "abrupt":
            return self.density
        ramp = SparsityRamp(1.0, self.density, self.ramp_every, self.ramp_step)
        # Its first stair is what came before.
        return ramp(step - self.dense_steps + self.ramp_every)

    def as_json(self) -> dict[str, Any]:
        """For a file's head."""
        size = SIZES[self.size]
        shape = {"dim": size.dim, "depth": size.depth, "heads": size.heads, "head_dim": HEAD_DIM}
        return asdict(self) | shape | {"grid": list(self.grid), "kinds": list(self.kinds)}
