# SPDX-License-Identifier: Apache-2.0
"""Modules that stand for what a host's layer imports and a CPU run of it has no use for."""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any


class Anything:
    """What has every attribute and takes every call; a decorator of it gives its function back."""

    def __init__(self, name: str = "anything") -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(f"{self._name}.{name}")

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        if len(args) == 1 and not keywords and (callable(args[0]) or isinstance(args[0], type)):
            return args[0]
        return Anything(f"{self._name}()")

    def __mro_entries__(self, bases: object) -> tuple[type, ...]:
        return ()

    def __or__(self, other: object) -> Any:
        return self

    __ror__ = __or__

    def __getitem__(self, key: object) -> Any:
        return self

    def __iter__(self) -> Any:
        return iter(())

    def __bool__(self) -> bool:
        return False

    def __hash__(self) -> int:
        return id(self)


class LooseModule(ModuleType):
    """A module that has every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(f"{self.__name__}.{name}")


class Only(MetaPathFinder, Loader):
    """Of some packages, load these modules from their files; all others are loose.

    Args:
        root: where the packages lie.
        packages: names of packages.
        real: dotted modules to run; the packages above them are loose.
    """

    def __init__(self, root: Path, packages: set[str], real: set[str]) -> None:
        self.root, self.packages, self.real = root, packages, real

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        if name.split(".")[0] not in self.packages:
            return None
        if name in self.real:
            file = self.root.joinpath(*name.split(".")).with_suffix(".py")
            return spec_from_file_location(name, file)
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return LooseModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__path__ = []

    def __enter__(self) -> Only:
        sys.meta_path.insert(0, self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.meta_path.remove(self)
        for name in [each for each in sys.modules if each.split(".")[0] in self.packages]:
            del sys.modules[name]


def give(name: str, **values: Any) -> None:
    """Names of a loose module that a layer does use."""
    vars(importlib.import_module(name)).update(values)
