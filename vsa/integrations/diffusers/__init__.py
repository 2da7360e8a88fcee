# SPDX-License-Identifier: Apache-2.0
"""One call that makes the self-attention of a diffusers video transformer sparse."""

from importlib.util import find_spec

from vsa.installation import DISTRIBUTION

if find_spec("diffusers") is None:
    raise ImportError(
        "vsa.integrations.diffusers needs diffusers, which cannot be imported: "
        f"run pip install '.[diffusers]' in a clone of {DISTRIBUTION}, with Python 3.11 or newer"
    )

from vsa.integrations.diffusers.apply import apply_vsa, remove_vsa
from vsa.integrations.diffusers.collect import collect
from vsa.integrations.diffusers.gates import gates_state_dict, load_gates
from vsa.integrations.diffusers.steps import count_steps, denoising_step

__all__ = [
    "apply_vsa",
    "collect",
    "count_steps",
    "denoising_step",
    "gates_state_dict",
    "load_gates",
    "remove_vsa",
]
