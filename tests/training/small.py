# SPDX-License-Identifier: Apache-2.0
"""A recipe of milliseconds per step."""

from __future__ import annotations

from typing import Any

from vsa.training.settings import Settings

SMALL: dict[str, Any] = {
    "kinds": ("full", "vsa"),
    "size": "tiny",
    "grid": (4, 8, 8),
    "topk": 2,
    "seed": 0,
    "batch": 2,
    "learning_rate": 3e-3,
    "warmup": 10,
    "weight_decay": 0.01,
    "clip_norm": 1.0,
    "times": "logit-normal",
    "clips": 8,
    "real": 0.0,
    "held_out": 4,
    "every": 2,
    "ema": 0.0,
    "dense_steps": 2,
    "ramp_every": 1,
    "ramp_step": 0.2,
    "dtype": "float32",
    "compiled": False,
}


def settings(**changes: Any) -> Settings:
    """The recipe with some changes."""
    return Settings(**SMALL | changes)
