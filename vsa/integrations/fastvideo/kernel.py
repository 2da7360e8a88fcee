# SPDX-License-Identifier: Apache-2.0
"""A module in the place of ``fastvideo_kernel`` where that cannot be imported.

FastVideo asks for it before it looks at its layer, and its wheels are tied to one torch and one
Python. What is not provided here is missing as where the package is not installed.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from vsa.integrations.hosts.lists import PROVIDED
from vsa.integrations.hosts.patches import Patches

ROOT = "fastvideo_kernel"


class _Modules:
    """``sys.modules`` with attributes for entries, so that they are put back like others."""

    def __init__(self) -> None:
        self.__dict__ = sys.modules


def stand_in(patches: Patches) -> None:
    """Make modules of PROVIDED's names and functions, unless FastVideo's own can be imported."""
    try:
        importlib.import_module(ROOT)
    except Exception:  # a wheel of another torch ends with whatever its libraries raise
        for name in [each for each in sys.modules if each.split(".")[0] == ROOT]:
            del sys.modules[name]  # what an import that failed has left
        entries = _Modules()
        for name, functions in PROVIDED.items():
            module = ModuleType(name, "Functions over padded tiles, by vsa.")
            module.__spec__ = ModuleSpec(name, None, is_package=name == ROOT)
            module.__path__ = []
            vars(module).update(functions)
            patches.put(entries, name, module)
