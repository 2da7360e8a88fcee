# SPDX-License-Identifier: Apache-2.0
"""What selections look like, to choose ``topk`` by: numbers; ``vsa.plots`` draws them.

Public. An overlap is the share of kept tiles that two choices have in common: twice the tiles that
both keep over the tiles that each keeps, added up over query tiles. It is 1 for equal choices, 0
for disjoint ones, about the density for unrelated ones, and NaN where nothing is kept.
"""

from vsa.diagnostics.curves import Curves
from vsa.diagnostics.metrics import (
    NeighbourOverlap,
    RecallCurve,
    density,
    head_overlap,
    neighbour_overlap,
    overlap,
    recall_curve,
    sampled_recall,
)
from vsa.diagnostics.precision import PrecisionErrors
from vsa.diagnostics.watch import watch, watch_precision

__all__ = [
    "Curves",
    "NeighbourOverlap",
    "PrecisionErrors",
    "RecallCurve",
    "density",
    "head_overlap",
    "neighbour_overlap",
    "overlap",
    "recall_curve",
    "sampled_recall",
    "watch",
    "watch_precision",
]
