# SPDX-License-Identifier: Apache-2.0
"""What the fine stage should return, in fp64, for a sample of its tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from vsa.values.grid import Grid

# cuDNN is left out: it would build a plan for each of thousands of lengths.
YARDSTICK = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Exact:
    """What the fine stage should return, in fp64, for those tokens that are asked for.

    Tokens form groups: the video's tiles, then the valid text, then the padding. What is kept for
    every token and head, ``lse`` and ``delta`` = sum(grad * out), is NaN until it is asked for.

    Args:
        grid: of the sequence.
        chosen: (heads, num_tiles, num_tiles) bool, which query tile attends which key tile.
        valid: (1, text) bool, which text tokens are real; None for all.
        inputs: q, k, v and the gradient of the output, (1, S, heads, head_dim) each; k and v may
            have fewer heads.
        tail: whether tiles that are not chosen enter the softmax of the video's queries by their
            means.
    """

    def __init__(
        self,
        grid: Grid,
        chosen: Tensor,
        valid: Tensor | None,
        *inputs: Tensor,
        tail: bool = False,
    ):
        self.q, self.k, self.v, self.grad = (x[0].transpose(0, 1) for x in inputs)
        self.share = len(self.q) // len(self.k)
        text = torch.full((grid.text,), grid.num_tiles, device=chosen.device)
        if valid is not None:
            text += ~valid[0]
        video = grid.tile_of_token(chosen.device)
        self.group = torch.cat((text[: grid.prefix], video, text[grid.prefix :]))
        with_text = functional.pad(chosen, (0, 1, 0, 1), value=True)
        self.attends = functional.pad(with_text, (0, 1, 0, 1), value=False)
        self.means: tuple[Tensor, ...] = ()
        if tail:
            self.sizes = grid.tile_sizes(chosen.device).double()
            where = slice(grid.prefix, grid.prefix + grid.tokens)
            self.means = tuple(_means(x[:, where], grid, self.sizes) for x in (self.k, self.v))
        unknown = self.q.new_full((3, len(self.q), grid.length), torch.nan, dtype=torch.float64)
        self.lse, self.delta, self.rounded_delta = unknown

    def members(self, group: int) -> Tensor:
        """Sequence positions of a group, (n,) int64."""
        return (self.group == group).nonzero().flatten()

    def inputs(self, head: int, tokens: Tensor) -> tuple[Tensor, ...]:
        """Of n tokens of one group: q and grad (n, D), k and v of all m that they attend (m, D)."""
        seen = self.attends[head, self.group[tokens[0]]][self.group].nonzero().flatten()
        queries, keys = (head, tokens), (head // self.share, seen)
        return self.q[queries], self.grad[queries], self.k[keys], self.v[keys]

    def tail(self, head: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
        """Means of keys and of values that a group attends, (m, D) fp64, and their sizes (m,)."""
        tiles = len(self.sizes)
        left_out = ~self.attends[head, group, :tiles] & (group < tiles)
        k, v = (mean[head // self.share, left_out] for mean in self.means)
        return k, v, self.sizes[left_out]

    def forward(self, head: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Of n tokens of one group: out and dq, (n, D) fp64; lse and delta are kept."""
        q, grad, k, v = (x.double() for x in self.inputs(head, tokens))
        scale = q.shape[-1] ** -0.5
        scores = scale * q @ k.T
        if self.means:
            more_k, more_v, sizes = self.tail(head, int(self.group[tokens[0]]))
            scores = torch.cat((scores, scale * q @ more_k.T + sizes.log()), dim=-1)
            k, v = torch.cat((k, more_k)), torch.cat((v, more_v))
        p = scores.softmax(-1)
        out = p @ v
        delta = (grad * out).sum(-1)
        self.lse[head, tokens], self.delta[head, tokens] = scores.logsumexp(-1), delta
        self.rounded_delta[head, tokens] = (grad * out.to(self.q.dtype)).sum(-1)
        return out, scale * (p * (grad @ v.T - delta[:, None])) @ k

    def sdpa(self, head: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The same by PyTorch in the type of the inputs."""
        q, grad, k, v = (x[None, None] for x in self.inputs(head, tokens))
        q.requires_grad_()
        with sdpa_kernel(YARDSTICK):
            out = functional.scaled_dot_product_attention(q, k, v)
            (dq,) = torch.autograd.grad(out, q, grad)
        return out[0, 0].detach(), dq[0, 0]

    def key_gradients(self, kv_head: int, tokens: Tensor, rounded: bool) -> tuple[Tensor, Tensor]:
        """Of n tokens of one group: dk and dv, (n, D).

        In fp64, or in fp32 with P and dS rounded to the inputs' type.
        """
        wide = torch.float32 if rounded else torch.float64
        k, v = (x[kv_head, tokens].to(wide) for x in (self.k, self.v))
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        for head in range(kv_head * self.share, (kv_head + 1) * self.share):
            attending = self.attends[head, :, self.group[tokens[0]]][self.group]
            more_k, more_v = self._gradients_of(head, attending, k, v, 0, rounded)
            dk += more_k
            dv += more_v
            if self.means and self.group[tokens[0]] < len(self.sizes):
                size = self.sizes[self.group[tokens[0]]]
                mean = kv_head, self.group[tokens[0]][None]
                keys, values = (x[mean].to(wide) for x in self.means)
                others = ~attending & (self.group < len(self.sizes))
                more_k, more_v = self._gradients_of(
                    head, others, keys, values, size.log().to(wide), rounded
                )
                dk += more_k / size
                dv += more_v / size
        return dk, dv

    def _gradients_of(
        self,
        head: int,
        attending: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | float,
        rounded: bool,
    ) -> tuple[Tensor, Tensor]:
        """Gradients of keys and values (n, D) through those of a head's queries that attend them.

        Args:
            head: of the queries.
            attending: (S,) bool, which of them.
            k: the keys.
            v: the values.
            bias: what is added to their scores.
            rounded: see ``key_gradients``.
        """
        queries, scale = attending.nonzero().flatten(), k.shape[-1] ** -0.5
        for group in self.group[queries[self.lse[head, queries].isnan()]].unique():
            for run in self.members(group).split(64):
                self.forward(head, run)
        kept = self.lse, self.rounded_delta if rounded else self.delta
        q, grad, lse, delta = (x[head, queries].to(k.dtype) for x in (self.q, self.grad, *kept))
        p = (scale * q @ k.T + bias - lse[:, None]).exp()
        ds = p * (grad @ v.T - delta[:, None])
        if rounded:
            p, ds = (x.to(self.k.dtype).to(k.dtype) for x in (p, ds))
        return scale * ds.T @ q, p.T @ grad


def _means(x: Tensor, grid: Grid, sizes: Tensor) -> Tensor:
    """Means of the video's tiles, (heads, tokens, D) -> (heads, num_tiles, D) fp64."""
    sums = torch.zeros(len(x), len(sizes), x.shape[-1], dtype=torch.float64, device=x.device)
    return sums.index_add_(1, grid.tile_of_token(x.device), x.double()) / sizes[:, None]
