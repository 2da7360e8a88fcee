# SPDX-License-Identifier: Apache-2.0
"""One layer whose sequence is on several ranks, beside the whole of it on each: bench/parallel.py.

Every rank computes the layer alone, too, and compares its share of the output and of the gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import vsa
from vsa.distributed import exchange, ulysses_attention
from vsa.distributed.arrangement import Asked, Tensors, arrange
from vsa.distributed.exchange import Exchange
from vsa.distributed.shards import ranks_of
from vsa.distributed.text import Text, parted
from vsa.distributed.ulysses import attend_shards
from vsa.measure.shapes import Shape
from vsa.stages.inputs import DEFAULT_TILE

NAMES = "q", "k", "v", "gate_coarse"
DIRECTIONS = "forward", "forward+backward"


class Way(NamedTuple):
    """One way of exchanging.

    Attributes:
        head_groups: as in ``ulysses_attention``.
        transport: by which all-to-alls.
        priority: "normal", or "high" for a group whose NCCL streams come first.
    """

    head_groups: int | None = None
    transport: exchange.Transport = "plain"
    priority: str = "normal"


@dataclass(frozen=True)
class Parity:
    """How far the ranks are from one process, the worst of them.

    Attributes:
        shape: of the layer.
        case: how the sequence is shared out.
        ranks: how many.
        chosen: share of the query tiles that keep other key tiles; ties and rounding may do that.
        errors: distance from one process as a share of its norm, of out and of every gradient.
    """

    shape: str
    case: str
    ranks: int
    chosen: float
    errors: dict[str, float]


def shares(length: int, ranks: int, kind: str) -> list[int]:
    """Tokens of every rank; uneven ones take an eighth, and one token, from the last to the first.

    Args:
        length: of the whole sequence.
        ranks: how many.
        kind: "even" or "uneven".
    """
    counts = [length // ranks + (rank < length % ranks) for rank in range(ranks)]
    moved = counts[-1] // 8 + 1 if kind == "uneven" else 0
    counts[0] += moved
    counts[-1] -= moved
    return counts


class Layer:
    """One layer on the ranks of a group, which makes the same numbers on each of them.

    Args:
        name: of its shape.
        layer: the shape; its text is on all ranks.
        kind: "even" or "uneven" shares.
        gated: whether there is a coarse gate per token.
        share: of the key tiles kept.
        groups: process groups by priority.
        device: where it runs.
    """

    def __init__(
        self,
        name: str,
        layer: Shape,
        kind: str,
        gated: bool,
        share: float,
        groups: dict[str, Any],
        device: torch.device,
    ) -> None:
        self.name, self.grid, self.groups, self.device = name, layer.grid, groups, device
        self.case = f"{kind} shares{', a coarse gate' * gated}"
        group = groups["normal"]
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.lengths = shares(layer.grid.tokens, self.ranks, kind)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        size = 1, layer.grid.length, layer.heads, layer.head_dim
        generator = torch.Generator(device).manual_seed(0)  # the same on all GPUs of a kind
        made = [
            torch.randn(size, device=device, dtype=dtype, generator=generator)
            for _ in range(4 + gated)
        ]
        for x in made:
            dist.broadcast(x, dist.get_global_rank(group, 0), group=group)
        self.upstream, *whole = made
        self.names = NAMES[: len(whole)]
        self.whole = [x.requires_grad_() for x in whole]
        self.mine = [self.share(x).detach().clone().requires_grad_() for x in whole]
        self.own_upstream = self.share(self.upstream, self.ranks)
        self.topk = share
        text = "replicated" if layer.grid.text else "sharded"
        self.settings: dict[str, Any] = {"lengths": self.lengths, "text": text}

    def share(self, x: Tensor, parts_of_text: int = 1) -> Tensor:
        """This rank's tokens of a whole sequence, (B, S, ...), and a part of the text's numbers."""
        prefix, video, suffix = parted(x, self.grid)
        video = video.split(self.lengths, dim=1)[self.rank]
        return torch.cat([prefix / parts_of_text, video, suffix / parts_of_text], dim=1)

    def alone(self, **more: Any) -> Any:
        """The whole layer on this rank."""
        q, k, v, *gate = self.whole
        own = dict(zip(NAMES[3:], gate, strict=False))
        return vsa.attention(q, k, v, self.topk, grid=self.grid, **own | more)

    def together(self, **more: Any) -> Any:
        """This rank's part of the layer on all of them."""
        q, k, v, *gate = self.mine
        own = self.settings | dict(zip(NAMES[3:], gate, strict=False))
        own |= {"topk": self.topk, "group": self.groups["normal"], "grid": self.grid}
        return ulysses_attention(q, k, v, **own | more)

    def by(self, way: Way) -> Any:
        """``together`` with other exchanges."""
        given, asked = self._asked(way.head_groups)
        return attend_shards(given, asked, ranks_of(self.groups[way.priority]), way.transport)

    def both(self, attend: Callable[[], Any], alone: bool) -> tuple[Tensor, ...]:
        """A forward and its backward."""
        if alone:
            return torch.autograd.grad(attend(), self.whole, self.upstream)
        return torch.autograd.grad(attend(), self.mine, self.own_upstream)

    def calls(self, attend: Callable[[], Any], alone: bool) -> dict[str, Callable[[], Any]]:
        """``DIRECTIONS`` as calls that can be timed."""
        return {
            DIRECTIONS[0]: torch.no_grad()(attend),
            DIRECTIONS[1]: functools.partial(self.both, attend, alone),
        }

    def parts(self) -> dict[str, tuple[Callable[[], object], int]]:
        """What a forward consists of, each apart and with nothing beside it, and bytes sent."""
        given, asked = self._asked(1)
        ranks = ranks_of(self.groups["normal"])
        how, _ = arrange(given, asked, ranks)
        text = Text(given[:3], [self.grid] * 3, ranks)
        videos = [x.detach() for x in (text.videos if self.grid.text else given[:3])]
        videos += [x.detach() for x in self.mine[3:]]

        @torch.no_grad()
        def there() -> list[Tensor]:
            sent = Exchange(how.sent, ranks.heads)
            xs = sent.take_heads(0, sent.send_heads(videos))
            return text.around(xs, how.heads[0]) if self.grid.text else xs

        q, k, v, *gate = (x.detach() for x in there())
        own = dict(zip(NAMES[3:], gate, strict=False))

        @torch.no_grad()
        def kernels() -> Tensor:
            return vsa.attention(q, k, v, self.topk, grid=self.grid, **own)

        tokens = [n + self.grid.text for n in self.lengths]
        out = torch.randn_like(q[:, :1]).expand(-1, sum(tokens), -1, -1).contiguous()

        @torch.no_grad()
        def back() -> list[Tensor]:
            sent = Exchange(how.returned, ranks.heads)
            return sent.take_tokens(sent.send_tokens(0, [out]))

        given_away = (self.ranks - 1) * videos[0].nbytes // self.ranks
        return {
            "sequence to heads": (there, given_away * len(videos)),
            "kernels": (kernels, 0),
            "heads to sequence": (back, given_away),
        }

    def parity(self) -> Parity:
        """Compare with one process, gradients included."""
        out, chosen = self.alone(return_selection=True)
        heads = out.shape[2] // self.ranks
        bitmap = chosen.bitmap[:, self.rank * heads : (self.rank + 1) * heads].contiguous()
        with torch.no_grad():
            _, own = self.together(return_selection=True)
        worst = [(own.bitmap != bitmap).any(-1).float().mean().double()]
        part = self.together(topk=None, selection=replace(chosen, bitmap=bitmap))
        worst.append(_distance(part, self.share(out)))
        found = torch.autograd.grad(part, self.mine, self.own_upstream)
        wanted = torch.autograd.grad(out, self.whole, self.upstream)
        worst += [
            _distance(self._summed(a), self.share(b)) for a, b in zip(found, wanted, strict=True)
        ]
        together = torch.stack(worst)
        dist.all_reduce(together, dist.ReduceOp.MAX, self.groups["normal"])
        share, *each = together.tolist()
        names = "out", *self.names
        errors = dict(zip(names, each, strict=True))
        return Parity(self.name, self.case, self.ranks, share, errors)

    def _summed(self, grad: Tensor) -> Tensor:
        """Gradients of the text come in parts."""
        prefix, video, suffix = (x.contiguous() for x in parted(grad, self.grid))
        for text in (prefix, suffix):
            if text.numel():
                dist.all_reduce(text, group=self.groups["normal"])
        return torch.cat([prefix, video, suffix], dim=1)

    def _asked(self, head_groups: int | None) -> tuple[Tensors, Asked]:
        q, k, v, *gate = self.mine
        given = Tensors(q, k, v, gate[0] if gate else None, None, None, None)
        grids = self.grid, self.lengths, None, None, DEFAULT_TILE
        text = self.settings["text"]
        rest = None, "mean", text, False, None, False, False, "native", "auto", head_groups
        return given, Asked(self.topk, *grids, *rest)


def groups_of(size: int, device: torch.device) -> dict[str, Any]:
    """Process groups of the first ranks, by the priority of their streams; all ranks call it."""
    members: Sequence[int] = range(size)
    if device.type != "cuda":
        group = dist.new_group(members)
        return {"normal": group, "high": group}
    first = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    return {
        "normal": dist.new_group(members),
        "high": dist.new_group(members, pg_options=first),
    }


def _distance(found: Tensor, wanted: Tensor) -> Tensor:
    # By heads, since fp64 of a whole layer is large.
    each = zip(found.unbind(2), wanted.unbind(2), strict=True)
    norms = torch.stack(
        [torch.stack([(a.double() - b.double()).norm(), b.double().norm()]) for a, b in each]
    )
    off, whole = norms.norm(dim=0)
    return (off / whole).nan_to_num(nan=torch.inf)
