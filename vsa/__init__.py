# SPDX-License-Identifier: Apache-2.0
"""Video Sparse Attention: trainable block-sparse 3-D attention for video diffusion transformers."""

from pathlib import Path

from vsa.installation import installed_version, take_built

if take_built(Path(__file__).resolve().parent):  # else the installed package is in its place
    __version__ = installed_version()

    from vsa import diagnostics, distributed, masks, nn
    from vsa.calibration import calibrate
    from vsa.cost import flops
    from vsa.diagnostics import plots
    from vsa.drop_ins import (
        block_sparse_attn,
        block_sparse_attn_from_indices,
        video_sparse_attn,
    )
    from vsa.functional import attention, block_sparse_attention, select
    from vsa.measure.flop_formulas import register_when_imported
    from vsa.schedule import SparsityRamp, StepSchedule
    from vsa.values.budget import LayerBudget, TopP
    from vsa.values.budgets import Budgets
    from vsa.values.grid import Grid, best_tile
    from vsa.values.kv_cache import KVCache
    from vsa.values.score import SubBlocks
    from vsa.values.selection import Selection
    from vsa.values.sequence import Segment, Sequence

    register_when_imported()

__all__ = [
    "Budgets",
    "Grid",
    "KVCache",
    "LayerBudget",
    "Segment",
    "Selection",
    "Sequence",
    "SparsityRamp",
    "StepSchedule",
    "SubBlocks",
    "TopP",
    "attention",
    "best_tile",
    "block_sparse_attention",
    "block_sparse_attn",
    "block_sparse_attn_from_indices",
    "calibrate",
    "diagnostics",
    "distributed",
    "flops",
    "masks",
    "nn",
    "plots",
    "select",
    "video_sparse_attn",
]
