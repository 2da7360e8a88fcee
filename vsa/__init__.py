# SPDX-License-Identifier: Apache-2.0
"""Video Sparse Attention: trainable block-sparse 3-D attention for video diffusion transformers."""

from pathlib import Path

from vsa.installation import installed_version, take_built

if take_built(Path(__file__).resolve().parent):  # else the installed package is in its place
    __version__ = installed_version()

    from vsa import diagnostics, distributed, nn, plots
    from vsa.attention import attention
    from vsa.budget import TopP
    from vsa.fine import block_sparse_attention
    from vsa.flop_formulas import register_when_imported
    from vsa.flops import flops
    from vsa.grid import Grid, best_tile
    from vsa.schedule import SparsityRamp
    from vsa.select import Selection, select

    register_when_imported()

__all__ = [
    "Grid",
    "Selection",
    "SparsityRamp",
    "TopP",
    "attention",
    "best_tile",
    "block_sparse_attention",
    "diagnostics",
    "distributed",
    "flops",
    "nn",
    "plots",
    "select",
]
