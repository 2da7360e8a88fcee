# SPDX-License-Identifier: Apache-2.0
"""FastVideo's VIDEO_SPARSE_ATTN layers on ``vsa.attention``, in raster order."""

from vsa.integrations.fastvideo.setup import install, uninstall

__all__ = ["install", "uninstall"]
