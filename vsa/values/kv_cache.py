# SPDX-License-Identifier: Apache-2.0
"""Keys and values of a video that is made chunk by chunk, in a ring whose slots never move.

Slots lie after each other along t in one tensor. Those of the sinks come first; the others are a
ring, in which a new chunk takes the place of the oldest. Keys are a set, so attention may read the
slots where they lie. Only the choice of tiles knows an order, for equal scores go to the first one:
it is made in the order of time, from tile means, and its bits are then put into the order of slots.

A chunk's slot and both orders are numbers on the device, which ``advance`` copies from a table.
Once all slots are in use, nothing that a call launches depends on where the ring stands.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vsa.values import bitmap, checks
from vsa.values.grid import Extent, Grid
from vsa.values.kv_checks import check_kind, is_capturing, tile_of
from vsa.values.ring import Ring
from vsa.values.selection import Selection


class KVCache:
    """The keys and values of past chunks of a video, for ``vsa.attention(..., cache=cache)``.

    A call with the current chunk's q, k and v writes k and v in the chunk's place, as often as it
    is denoised, and attends [sinks | window | current]. All memory is taken here. One layer of a
    model has one cache. It holds no gradients: training takes ``vsa.masks.ChunkCausal``.

    Args:
        batch: B.
        kv_heads: heads of keys and values; where heads are spread over processes, those of this
            one.
        head_dim: channels of a head.
        chunk: (T, H, W) latent tokens of a chunk.
        capacity: chunks that are held, the current one included.
        sinks: first chunks of the video, that never leave.
        tile: tokens per tile along (t, h, w), whose extent along t divides that of ``chunk``;
            "auto" wastes the fewest slots.
        prefix: text tokens that stand before the video; they stay (``write_text``).
        dtype: of q, k and v.
        device: where they are; None for PyTorch's default.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        chunk: Extent,
        capacity: int,
        *,
        sinks: int = 0,
        tile: Extent | str = "auto",
        prefix: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        self.batch = checks.integer("batch", batch, at_least=1)
        self.kv_heads = checks.integer("kv_heads", kv_heads, at_least=1)
        self.head_dim = checks.integer("head_dim", head_dim, at_least=1)
        self.chunk = checks.extent("chunk", chunk)
        self.capacity = checks.integer("capacity", capacity, at_least=1)
        self.sinks = checks.count("sinks", sinks)
        self.prefix = checks.count("prefix", prefix)
        if self.sinks > self.capacity:
            raise ValueError(
                f"sinks must be at most capacity, of which they are a part, but it is {sinks} and "
                f"capacity is {capacity}"
            )
        if dtype not in checks.DTYPES:
            raise TypeError(
                f"dtype must be bfloat16, float16, float32 or float64, but it is {dtype}"
            )
        self.tile = tile_of(self.chunk, tile)
        with torch.inference_mode(False):  # later calls may be in that mode or not
            self._take_memory(dtype, device)
        self._past, self._turn = 0, 0
        self._videos, self._number = 0, 0
        self._written, self._has_text = False, self.prefix == 0
        self._captured: set[int] = set()
        self._settings = (
            self.batch, self.kv_heads, self.head_dim, self.chunk, self.tile, self.dtype,
            self.device,
        )  # fmt: skip

    def _take_memory(self, dtype: torch.dtype, device: torch.device | str | None) -> None:
        tokens, tiles = self._grid.tokens, self._grid.num_tiles
        length = self.prefix + self.capacity * tokens
        rows = self.batch, length, self.kv_heads, self.head_dim
        self._tokens = torch.zeros(2, *rows, dtype=dtype, device=device)
        wide = torch.promote_types(dtype, torch.float32)
        per_tile = self.batch, self.kv_heads, self.capacity, tiles, self.head_dim
        self._means = torch.zeros(2, *per_tile, dtype=wide, device=device)
        table = [_numbers(self.capacity, self.sinks, turn) for turn in range(max(1, self._ring))]
        self._table = torch.tensor(table, dtype=torch.int64, device=device)
        self._now = self._table[0].clone()

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self._tokens.dtype

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self._tokens.device

    @property
    def chunks(self) -> int:
        """Chunks that are held, the current one once it is written."""
        return self._past + self._written

    @property
    def past(self) -> int:
        """Chunks that are held besides the current one."""
        return self._past

    @property
    def position(self) -> tuple[int, int]:
        """How many videos came before, and how many chunks of this one, those that left as well."""
        return self._videos, self._number

    @property
    def nbytes(self) -> int:
        """Memory in bytes; it never grows."""
        held = self._tokens, self._means, self._table, self._now
        return sum(x.numel() * x.element_size() for x in held)

    @property
    def ring(self) -> Ring:
        """Where it stands."""
        return Ring(self.capacity, self.sinks, self.prefix, self._past)

    @property
    def kind(self) -> Hashable | None:
        """All that a call depends on besides numbers on the device; None if it has no plan."""
        if type(self._tokens) is not Tensor:  # made under a mode that makes others
            return None
        return *self._settings, *self.ring, self._has_text

    @property
    def memory(self) -> tuple[Tensor, ...]:
        """All that a call reads and writes, see ``vsa.backends.base.Prepared``."""
        return self._tokens, self._means, self._now

    def advance(self) -> None:
        """The current chunk becomes past; beyond capacity the oldest one that is no sink leaves.

        No keys move, nothing is allocated, and the host does not wait.

        Raises:
            ValueError: no current chunk has been written, or a CUDA graph is being captured.
        """
        if not self._written and self._past + 1 not in self._captured:
            raise ValueError(
                "cache has no current chunk to advance from: call vsa.attention(..., cache=cache) "
                "with one before cache.advance()"
            )
        if is_capturing(self.device):
            raise ValueError(
                "cache cannot advance while a CUDA graph is captured: call cache.advance() between "
                "replays"
            )
        self._written = False
        self._number += 1
        if self._past + 1 < self.capacity or not self._ring:
            self._past += 1
            return
        self._turn = (self._turn + 1) % self._ring
        self._now.copy_(self._table[self._turn])

    def reset(self) -> None:
        """Forget all chunks and the text, for another video. Captured graphs stay good."""
        self._past, self._turn = 0, 0
        self._videos, self._number = self._videos + 1, 0
        self._written, self._has_text = False, self.prefix == 0
        self._now.copy_(self._table[0])

    def write_text(self, k: Tensor, v: Tensor) -> None:
        """Keys and values of the text before the video, which stay until ``reset``.

        Not needed where the text's tokens stand in each call's q, k and v.

        Args:
            k: (B, prefix, kv_heads, head_dim).
            v: like k.

        Raises:
            ValueError, TypeError: tensors that do not fit, or a gradient that is wanted.
        """
        wanted = self.batch, self.prefix, self.kv_heads, self.head_dim
        if not self.prefix:
            raise ValueError(
                "prefix of the cache is 0, so it has no place for text: pass prefix= to vsa.KVCache"
            )
        for name, x in (("k", k), ("v", v)):
            checks.plain(name, checks.tensor(name, x))
            if tuple(x.shape) != wanted:
                raise ValueError(
                    f"{name} must be (batch, prefix, kv_heads, head_dim) = {wanted} of the cache, "
                    f"but its shape is {tuple(x.shape)}"
                )
            check_kind(name, x, self.dtype, self.device)
        with torch.no_grad():
            self._tokens[0, :, : self.prefix].copy_(k)
            self._tokens[1, :, : self.prefix].copy_(v)
        self._has_text = True

    def check_room(self, with_text: bool) -> None:
        """There is a place for the current chunk, and the text is there or comes along."""
        if self._past == self.capacity:
            raise ValueError(
                f"cache has no place for another chunk: all {self.capacity} of its capacity are "
                "sinks, which never leave"
            )
        if not with_text and not self._has_text:
            raise ValueError(
                f"cache has a prefix of {self.prefix} text tokens that nobody has written: call "
                "cache.write_text(k, v), or pass q, k and v with the text's tokens before the video"
            )

    def grid_of(self, text: int) -> Grid:
        """Of the current chunk, behind so many text tokens."""
        return Grid(self.chunk, self.tile, text)

    @property
    def kv_grid(self) -> Grid:
        """Of the keys that the current chunk attends, its own included, in the order of time."""
        t, h, w = self.chunk
        return Grid(((self._past + 1) * t, h, w), self.tile, self.prefix)

    def write(self, k: Tensor, v: Tensor, means: Sequence[Tensor]) -> None:
        """The current chunk, in its place.

        Args:
            k: (B, [prefix +] tokens of a chunk, kv_heads, head_dim), checked.
            v: like k.
            means: of the tiles of k and of v, (B, kv_heads, tiles of a chunk, head_dim).
        """
        text = k.shape[1] - self._grid.tokens
        is_full, slot = self._is_full, self._now[:1]
        slots = self._tokens[:, :, self.prefix :].unflatten(2, (self.capacity, -1))
        for of_tokens, of_means, x, mean, all_tokens in zip(
            slots, self._means, (k, v), means, self._tokens, strict=True
        ):
            if text:
                all_tokens[:, : self.prefix].copy_(x[:, :text])
            if is_full:
                of_tokens.index_copy_(1, slot, x[:, text:].unsqueeze(1))
                of_means.index_copy_(2, slot, mean.unsqueeze(2))
            else:
                of_tokens[:, self._past].copy_(x[:, text:])
                of_means[:, :, self._past].copy_(mean)
        self.note_written(text > 0)

    def note_written(self, with_text: bool) -> None:
        """The current chunk is in its place, and the text that came along."""
        self._has_text = self._has_text or with_text
        if is_capturing(self.device):  # it is written by replays, which nobody here sees
            self._captured.add(self._past + 1)
        else:
            self._written = True

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """(B, S_k, kv_heads, head_dim) each, text and chunks in the order of slots; views."""
        length = self.prefix + (self._past + 1) * self._grid.tokens
        return self._tokens[0, :, :length], self._tokens[1, :, :length]

    def keys_in_time(self) -> Tensor:
        """The keys in the order of time: a copy of all of them, once the ring is full."""
        keys, _ = self.keys_and_values()
        if not self._is_full:
            return keys
        slots = keys[:, self.prefix :].unflatten(1, (self.capacity, -1))
        video = slots.index_select(1, self._order).flatten(1, 2)
        return torch.cat((keys[:, : self.prefix], video), dim=1)

    def means(self, in_time: bool) -> tuple[Tensor, Tensor]:
        """Of the tiles of keys and values, (B, kv_heads, n_k, head_dim) each, contiguous.

        Args:
            in_time: whether in the order of time, or of slots.
        """
        means = self._means[:, :, :, : self._past + 1]
        if in_time and self._is_full:
            means = means.index_select(3, self._order)
        keys, values = means.flatten(3, 4)
        return keys.contiguous(), values.contiguous()

    def in_slots(self, selection: Selection) -> Selection:
        """A choice made in the order of time, by the keys as they lie."""
        if not self._is_full:
            return selection
        chosen = selection.mask().unflatten(-1, (self.capacity, -1))
        chosen = chosen.index_select(-2, self._place).flatten(-2)
        return replace(selection, bitmap=bitmap.pack(chosen))

    @property
    def _grid(self) -> Grid:
        return Grid(self.chunk, self.tile)

    @property
    def _ring(self) -> int:
        """Slots that chunks leave again."""
        return self.capacity - self.sinks

    @property
    def _is_full(self) -> bool:
        """Whether all slots are in use, the current chunk's included."""
        return self._past + 1 == self.capacity

    @property
    def _order(self) -> Tensor:
        """The slot of each chunk, in the order of time, once all slots are in use."""
        return self._now[1 : 1 + self.capacity]

    @property
    def _place(self) -> Tensor:
        """The inverse: the chunk in each slot."""
        return self._now[1 + self.capacity :]

    def __repr__(self) -> str:
        return (
            f"KVCache(batch={self.batch}, kv_heads={self.kv_heads}, head_dim={self.head_dim}, "
            f"chunk={self.chunk}, tile={self.tile}, chunks={self.chunks} of {self.capacity}, "
            f"sinks={self.sinks}, prefix={self.prefix}, dtype={self.dtype}, device={self.device})"
        )


def _numbers(capacity: int, sinks: int, turn: int) -> list[int]:
    """The current chunk's slot, the slots in the order of time, and the chunks by slot."""
    ring = capacity - sinks
    order = [*range(sinks), *(sinks + (turn + place) % ring for place in range(ring))]
    return [order[-1], *order, *sorted(range(capacity), key=order.__getitem__)]
