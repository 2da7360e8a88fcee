# SPDX-License-Identifier: Apache-2.0
"""``torch.ops.vsa.*``: what autograd, torch.compile and checkpointing see of a stage. Not public.

Each hands its arguments to the backend that they name.
"""
