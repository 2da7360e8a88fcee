# SPDX-License-Identifier: Apache-2.0
"""The video of a transformer with joint attention in shards over ranks, its text on all of them.

diffusers has no context-parallel plan for these families, and its own attention would count the
text once for every rank. So hooks of our own hand each rank its part of the video before the first
block and gather the result behind the last projection; between them all attention is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vsa.distributed.shards import even_shares
from vsa.integrations.diffusers.passes import OfThread


class _Tokens(OfThread):
    def __init__(self) -> None:
        self.tokens = 0


@dataclass(eq=False)
class Sharding:
    """Who holds which part of the video: contiguous parts in the order of ranks.

    Attributes:
        group: the process group.
        ranks: their number.
        rank: this one.
    """

    group: Any
    ranks: int
    rank: int
    _running: _Tokens = field(default_factory=_Tokens)

    def __deepcopy__(self, memo: object) -> Sharding:
        # A process group cannot be copied, and need not be.
        return Sharding(self.group, self.ranks, self.rank)

    @property
    def tokens(self) -> int:
        """Of the whole video in the pass that runs in this thread; the pre-hook sets it."""
        return self._running.tokens

    @tokens.setter
    def tokens(self, tokens: int) -> None:
        self._running.tokens = tokens

    def install(self, transformer: Any, first: nn.Module) -> list[RemovableHandle]:
        """Put the hooks in place.

        Args:
            transformer: whose ``proj_out`` comes after the last block.
            first: its first block.
        """
        return [
            first.register_forward_pre_hook(self._part, with_kwargs=True),
            transformer.proj_out.register_forward_hook(self._gather),
        ]

    def part(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of a tensor."""
        return x.tensor_split(self.ranks, dim=dim)[self.rank]

    def _part(self, block: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Part ``hidden_states``, the first argument of every block."""
        if args:
            return (self.part(args[0], 1), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self.part(kwargs["hidden_states"], 1)}

    def _gather(self, projection: nn.Module, args: Any, output: Tensor) -> Tensor:
        return _GatherTokens.apply(output, self, even_shares(self.tokens, self.ranks))


class _GatherTokens(torch.autograd.Function):
    """(B, S_r, channels) of every rank -> (B, sum of S_r, channels) on every rank.

    All ranks compute the same loss of what they gathered, so that each hands back its own part of
    the gradient alone: the gradients of weights then are parts that add up over ranks, as they are
    where diffusers shards a model.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, sharding: Sharding, lengths: list[int]) -> Tensor:
        ctx.sharding = sharding
        # Gloo gathers equal shards only.
        padded = nn.functional.pad(x, (0, 0, 0, max(lengths) - x.shape[1])).contiguous()
        shards = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(shards, padded, group=sharding.group)
        return torch.cat([s[:, :n] for s, n in zip(shards, lengths, strict=True)], dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.sharding.part(grad, 1), None, None
