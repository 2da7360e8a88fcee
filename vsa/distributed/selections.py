# SPDX-License-Identifier: Apache-2.0
"""Selections of a rank whose heads are computed in groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from vsa.values.selection import Selection
from vsa.values.tile_mask import TileMask


def of_heads(selection: Selection, heads: slice) -> Selection:
    """The selection of some heads."""
    return replace(
        selection,
        bitmap=selection.bitmap[:, heads].contiguous(),
        under=_under_of(selection, heads),
    )


def joined(parts: Sequence[Selection]) -> Selection:
    """Selections of groups of heads as one."""
    if len(parts) == 1:
        return parts[0]
    most = [part.most for part in parts if part.most is not None]
    bitmap = torch.cat([part.bitmap for part in parts], dim=1)
    under = parts[0].under
    if under is not None and under.allowed is not None and len(under.allowed) > 1:
        each = [part.under.allowed for part in parts if part.under is not None]
        under = under._replace(allowed=torch.cat([x for x in each if x is not None]))
    most_of_all = max(most) if len(most) == len(parts) else None
    return replace(parts[0], bitmap=bitmap, most=most_of_all, under=under)


def _under_of(selection: Selection, heads: slice) -> TileMask | None:
    """The mask of some heads of a selection."""
    under = selection.under
    if under is None or under.allowed is None or len(under.allowed) == 1:
        return under
    return under._replace(allowed=under.allowed[heads])
