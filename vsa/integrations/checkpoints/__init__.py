# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in diffusers' and in FastVideo's naming; needs neither of the two."""
