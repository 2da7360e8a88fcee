# SPDX-License-Identifier: Apache-2.0
"""A row of ``vsa bench``, as it is measured, written and read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from vsa.values.grid import Extent

TIMES = ("dense", "sparse", "stages", "host", "ways")
"""Fields of a measurement that are seconds, or seconds by name."""


@dataclass(frozen=True)
class Native:
    """Sparse attention in native precision, beside another one.

    Attributes:
        seconds: median.
        spread: half the distance between the quartiles, as a share of the median.
        gpu: what the GPU did meanwhile.
        errors: on sampled tiles.
    """

    seconds: float
    spread: float
    gpu: dict[str, float]
    errors: dict[str, float]


@dataclass(frozen=True)
class Measurement:
    """Sparse and dense attention on the same inputs in one run.

    Attributes:
        shape: its name in ``vsa.measure.shapes``, or its grid.
        pattern: "chosen" by vsa.attention from q and k, or the sparsity pattern that it was given.
        grid: (T, H, W) tokens.
        text: tokens that are not video.
        heads: query, key and value heads.
        head_dim: channels of a head.
        direction: "forward" or "forward+backward".
        kept: key tiles per query tile.
        tiles: key tiles in all.
        dense: median seconds of scaled_dot_product_attention.
        sparse: median seconds of vsa.attention, all stages; without coarse and select where it was
            given its pattern.
        dense_spread: half the distance between the quartiles, as a share of the median.
        sparse_spread: the same of sparse attention.
        dense_tflops: dense operations per second, in 10**12.
        sparse_tflops: operations on selected tokens per second, in 10**12.
        memory: peak bytes of vsa.attention beyond its inputs, outputs and gradients included.
        inputs: bytes of q, k and v.
        errors: of vsa.attention on sampled tiles, before it was timed (``vsa.verify.sampled``).
        dense_gpu: what the GPU did meanwhile (``vsa.measure.gpu_monitor``); empty on a CPU.
        sparse_gpu: the same during sparse attention.
        stages: seconds of the parts of vsa.attention, called one by one; empty if not asked for.
        host: seconds that the host takes to issue a call, of "dense", "sparse" and, if asked for,
            "compiled"; empty on a CPU.
        ways: median seconds of vsa.attention in a "graph" and "compiled"; empty if not asked for.
        tail: whether tiles that were not chosen entered the softmax by their means.
        precision: of the sparse runs.
        native: the same runs in native precision; None where that is theirs.
    """

    shape: str
    pattern: str
    grid: Extent
    text: int
    heads: int
    head_dim: int
    direction: str
    kept: int
    tiles: int
    dense: float
    sparse: float
    dense_spread: float
    sparse_spread: float
    dense_tflops: float
    sparse_tflops: float
    memory: int
    inputs: int
    errors: dict[str, float] = field(default_factory=dict)
    dense_gpu: dict[str, float] = field(default_factory=dict)
    sparse_gpu: dict[str, float] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)
    ways: dict[str, float] = field(default_factory=dict)
    tail: bool = False
    precision: str = "native"
    native: Native | None = None

    @property
    def native_tflops(self) -> float:
        """Of native precision, as ``sparse_tflops``."""
        seconds = self.sparse if self.native is None else self.native.seconds
        return self.sparse_tflops * self.sparse / seconds

    def row(self) -> dict[str, Any]:
        """As JSON files hold it, with times in ms."""
        row = {
            f"{name}_ms" if name in TIMES else name: _in_ms(value) if name in TIMES else value
            for name, value in asdict(self).items()
        }
        if row["native"] is not None:
            row["native"]["ms"] = _in_ms(row["native"].pop("seconds"))
        return row

    @classmethod
    def of_row(cls, row: dict[str, Any]) -> Measurement:
        """What ``row`` was made of.

        Raises:
            ValueError: a row of something else than ``vsa bench``.
        """
        given = {
            name.removesuffix("_ms"): _in_seconds(value) if name.endswith("_ms") else value
            for name, value in row.items()
        }
        try:
            if given.get("native") is not None:
                native = dict(given["native"])
                given["native"] = Native(seconds=_in_seconds(native.pop("ms")), **native)
            return cls(**given)
        except (TypeError, KeyError):
            raise ValueError(
                f"rows must be those of vsa bench --json, but one has {', '.join(row)}"
            ) from None


def _in_ms(value: Any) -> Any:
    return _scaled(value, 1e3)


def _in_seconds(value: Any) -> Any:
    return _scaled(value, 1e-3)


def _scaled(value: Any, factor: float) -> Any:
    if isinstance(value, dict):
        return {name: each * factor for name, each in value.items()}
    return value * factor
