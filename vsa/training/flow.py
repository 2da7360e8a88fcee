# SPDX-License-Identifier: Apache-2.0
"""Rectified flow (Liu et al., 2022): a straight line from video to noise, and its velocity.

    x_t = (1 - t) * video + t * noise,   velocity = noise - video
    loss = mean (model(x_t, t) - velocity)^2

t is uniform, or the logistic function of a normal number (Esser et al., 2024), which spends more
steps on the middle of the line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Times = Literal["logit-normal", "uniform"]
Model = Callable[[Tensor, Tensor], Tensor]


def times_at(shares: Tensor, kind: Times) -> Tensor:
    """Times below which so many shares of all times lie.

    Args:
        shares: in (0, 1), uniform if the times are to be random.
        kind: of the distribution.
    """
    return shares if kind == "uniform" else torch.special.ndtri(shares).sigmoid()


def clip_losses(model: Model, video: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """Mean squared error of the velocity for every clip, (B,) fp32.

    Args:
        model: from (B, S, numbers) and (B,) to (B, S, numbers).
        video: (B, S, numbers).
        noise: likewise.
        time: (B,) in [0, 1].
    """
    mixture = torch.lerp(video, noise, time[:, None, None])
    return (model(mixture, time) - (noise - video)).square().mean((1, 2))
