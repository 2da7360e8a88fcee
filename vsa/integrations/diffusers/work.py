# SPDX-License-Identifier: Apache-2.0
"""What one forward pass asks of one attention layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vsa.values.budget import TopK
from vsa.values.grid import Extent, Grid
from vsa.values.masks import Rule
from vsa.values.precision import Precision
from vsa.values.score import Score
from vsa.values.selection import Selection
from vsa.values.sequence import Sequence

if TYPE_CHECKING:
    from vsa.integrations.diffusers.sharding import Sharding


@dataclass(frozen=True)
class Work:
    """One layer's part in one forward pass of the transformer, never changed once made.

    The denoising step is left out on purpose: torch.compile guards on these values, and would
    compile again at every step.

    Attributes:
        shape: (T, H, W), the video tokens of this pass.
        tile: tokens per tile along (t, h, w).
        topk: as in ``vsa.attention``; None leaves this pass to diffusers' own attention, or keeps
            everything where ``keeps``.
        store: where this pass's selection is kept, None to keep none.
        reuse: whether to take the selection that lies in ``store``.
        group: process group whose ranks hold the sequence in shards; None for one process.
        sharding: of video tokens by hooks of ours, which the group is then that of.
        note: is told the queries, keys, selection, values and valid text of this pass, if somebody
            looks.
        before: tokens of keyframes or text that stand before the video, and attend everything.
        after: likewise after it.
        score: what tiles are chosen by, as in ``vsa.attention``.
        tail: as in ``vsa.attention``.
        precision: as in ``vsa.attention``.
        mask: as in ``vsa.attention``.
        keeps: whether a dense pass is one of ours that keeps everything: where the video is sharded
            by hooks of ours, or under a mask that diffusers' attention knows nothing of.
        packed: the whole sequence, where segments beside the video have tiles of their own in the
            coarse branch; None where a grid with text says it all.
    """

    shape: Extent
    tile: Extent
    topk: TopK | None
    store: Store | None = None
    reuse: bool = False
    group: Any = None
    sharding: Sharding | None = None
    note: Callable[[Tensor, Tensor, Selection, Tensor, Tensor | None], None] | None = None
    before: int = 0
    after: int = 0
    score: Score = "mean"
    tail: bool = False
    precision: Precision = "native"
    mask: Rule | None = None
    keeps: bool = False
    packed: Sequence | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the video's own sequence in this pass, keyframes and all."""
        return self.before + math.prod(self.shape) + self.after


@dataclass(eq=False)
class Store:
    """A selection that later denoising steps may take again."""

    selection: Selection | None = field(default=None)

    def fitting(self, grid: Grid | Sequence, batch: int) -> Selection | None:
        """The stored selection, None if it is of another grid or batch size."""
        found = self.selection
        if found is None or found.bitmap.shape[0] != batch:
            return None
        of = found.grid if found.sequences is None else found.sequences[0]
        return found if of == grid else None
