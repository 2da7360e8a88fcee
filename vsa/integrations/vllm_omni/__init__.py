# SPDX-License-Identifier: Apache-2.0
"""Plugins of vLLM-Omni: the slot FASTVIDEO_VSA on ``vsa.attention``, in raster order."""

from vsa.integrations.vllm_omni.plugins import lists_plugin, plugin

__all__ = ["lists_plugin", "plugin"]
