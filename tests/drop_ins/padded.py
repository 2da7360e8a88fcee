# SPDX-License-Identifier: Apache-2.0
"""Random calls over padded tiles, NaN in all padding, and how close is close enough."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import sdpa_kernel

from vsa.values.grid import Grid
from vsa.verify import padded_reference, parity


class Call(NamedTuple):
    """Shapes of a call; sizes of tiles cover whole ones, small ones and empty ones."""

    sizes: Sequence[int] = (64, 17, 0, 64, 33)
    kv_sizes: Sequence[int] | None = None
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 16
    volume: int = 64
    topk: float = 2
    weight: str | None = "full"
    magnitude: float = 1.0
    dtype: torch.dtype = torch.float64

    @property
    def of_keys(self) -> Sequence[int]:
        """Sizes of the keys' tiles."""
        return self.sizes if self.kv_sizes is None else self.kv_sizes

    def tensors(self, seed: int = 0, fill: float = float("nan")) -> dict[str, Tensor]:
        """q, k, v, the weight and gradients of the output and of the log-sum-exp."""
        generator = torch.Generator().manual_seed(seed)

        def normal(sizes: Sequence[int], heads: int) -> Tensor:
            shape = self.batch, heads, len(sizes) * self.volume, self.head_dim
            x = torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)
            return poisoned(x, sizes, self.volume, fill)

        found = {
            "q": normal(self.sizes, self.heads) * self.magnitude,
            "k": normal(self.of_keys, self.kv_heads),
            "v": normal(self.of_keys, self.kv_heads),
        }
        full = normal(self.sizes, self.heads)
        if self.weight == "full":
            found["weight"] = full
        if self.weight == "per head":
            found["weight"] = full[:1, :, :1, :1].clone()
        return found | {
            "grad": normal(self.sizes, self.heads),
            "grad_lse": normal(self.sizes, self.heads)[..., 0],
        }

    def lists(self, seed: int = 0) -> Tensor:
        """(B, heads, n_q, n_k) bool: rows that keep none, few, or all."""
        generator = torch.Generator().manual_seed(seed)
        shape = self.batch, self.heads, len(self.sizes), len(self.of_keys)
        share = torch.randint(4, shape[:3], generator=generator)[..., None] / 3
        return torch.rand(shape, generator=generator) < share


def numbers(sizes: Sequence[int]) -> Tensor:
    """Sizes as callers pass them."""
    return torch.tensor(sizes, dtype=torch.int32)


def padding(sizes: Sequence[int], volume: int) -> Tensor:
    """Which slots hold no token, (S,) bool."""
    return (torch.arange(volume) >= torch.tensor(sizes)[:, None]).flatten()


def poisoned(x: Tensor, sizes: Sequence[int], volume: int, fill: float) -> Tensor:
    """(B, heads, S, ...) with a number in all padding."""
    hidden = padding(sizes, volume)
    return x.masked_fill(hidden.view(1, 1, -1, *[1] * (x.ndim - 3)), fill)


def to_padded(x: Tensor, grid: Grid, fill: float) -> Tensor:
    """(B, S, heads, D) in raster order -> (B, heads, 64 * n, D): tokens of a tile come first."""
    tiles = x.new_full((x.shape[0], grid.num_tiles, 64, *x.shape[2:]), fill)
    for tile, tokens in enumerate(grid.tokens_of_tiles()):
        real = tokens[tokens >= 0]
        tiles[:, tile, : len(real)] = x[:, grid.prefix + real]
    return tiles.flatten(1, 2).transpose(1, 2)


def errors_of_sdpa(call: Call, kept: Tensor, seed: int = 0) -> dict[str, float]:
    """How far PyTorch's attention is off in this type, on tokens alone: out, and each gradient."""
    tensors, volume = call.tensors(seed), call.volume
    group, real = call.heads // call.kv_heads, ~padding(call.sizes, volume)
    key_real = ~padding(call.of_keys, volume)
    allowed = kept.repeat_interleave(volume, -1).repeat_interleave(volume, -2)
    allowed = allowed[:, :, real][..., key_real]
    idle = ~allowed.any(-1, keepdim=True)
    results = []
    for dtype in (torch.float64, call.dtype):
        q = tensors["q"][:, :, real].to(dtype).requires_grad_()
        k, v = (tensors[x][:, :, key_real].to(dtype).requires_grad_() for x in "kv")
        with sdpa_kernel(parity.KERNELS):  # whatever the process has switched off
            out = functional.scaled_dot_product_attention(
                q, *(x.repeat_interleave(group, 1) for x in (k, v)), attn_mask=allowed | idle
            ).masked_fill(idle, 0)
        grads = torch.autograd.grad(out, (q, k, v), tensors["grad"][:, :, real].to(dtype))
        results.append((out.detach(), *grads))
    names = ("out", "q", "k", "v")
    return {name: parity.error(x, y) for name, y, x in zip(names, *results, strict=True)}


def excess(found: Tensor, truth: Tensor, of_sdpa: float, dtype: torch.dtype) -> float:
    """Error as a multiple of PyTorch's, or of rounding the truth once where that is more.

    At most 2 passes; in fp64 there is nothing to compare with but the reference's own rounding.
    """
    found = found.detach().cpu()
    if dtype is torch.float64:
        return parity.error(found, truth) / 1e-12
    return parity.error(found, truth) / max(of_sdpa, parity.error(truth.to(dtype), truth), 1e-30)


class Rows:
    """A tensor (B, heads, S, D) whose rows are taken one by one, as the definition does.

    The gradient of an index is as large as all of the tensor: most of what the definition takes
    would be zeros that are added up, once for each row.
    """

    def __init__(self, x: Tensor) -> None:
        self._whole, self.shape = x, x.shape
        self._rows = x.flatten(0, 2).unbind()

    def expand(self, shape: torch.Size) -> Rows:
        """Itself, which has the shape."""
        assert shape == self.shape
        return self

    def __getitem__(self, at: tuple[int, ...]) -> Tensor:
        if len(at) == 2:
            return self._whole[at]
        sample, head, token = at
        return self._rows[(sample * self.shape[1] + head) * self.shape[2] + token]


def reference(call: Call, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Of ``video_sparse_attn`` on these tensors, the weight as it is broadcast."""
    return padded_reference.video_sparse_attn(
        Rows(tensors["q"]),
        tensors["k"],
        tensors["v"],
        call.sizes,
        call.of_keys,
        call.topk,
        call.volume,
        Rows(tensors["weight"]) if "weight" in tensors else None,
    )
