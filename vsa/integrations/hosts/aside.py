# SPDX-License-Identifier: Apache-2.0
"""Plugins that a host loads by itself leave its own kernels in place on GPUs that ours do not take.

Whoever installs this project beside a host has asked for nothing yet. Asking for the capability of
a device initialises CUDA in this process, which a process that forks must not do: the functions
here are for workers, where layers are made, never for the loading of a plugin.
"""

from __future__ import annotations

import logging

import torch

from vsa.backends import BACKENDS, Request

_said: set[str] = set()


def unsupported() -> str | None:
    """Why our kernels do not run on the current accelerator; None if they do, or there is none."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return None if device is None else BACKENDS["hopper"].why_not(Request(device.type))


def steps_aside(host: str, what: str, logger: str) -> bool:
    """Whether a host's own class is to stay, which is logged once in a process.

    Args:
        host: its name.
        what: which of its attention backends is asked about.
        logger: a name under which the host shows what is logged.
    """
    why = unsupported()
    if why is None:
        return False
    warn_once(
        f"vsa: {what} of {host} stays on {host}'s own kernel, because backend 'hopper' cannot run "
        f"on this device ({why}); vsa info says more",
        logger,
    )
    return True


def warn_once(sentence: str, logger: str) -> None:
    """Log a warning that this process has not logged yet."""
    if sentence not in _said:
        _said.add(sentence)
        logging.getLogger(logger).warning("%s", sentence)
