# SPDX-License-Identifier: Apache-2.0
"""Attention kernels of others beside ours, on identical inputs: what bench/peers.py runs."""
