# SPDX-License-Identifier: Apache-2.0
"""Imports of the package point down, type hints and imports inside of functions included."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parents[2]
LAYERS = (
    ("installation",),
    ("values",),
    ("backends",),
    ("operators",),
    ("stages",),
    ("functional", "drop_ins", "masks", "nn", "schedule", "cost"),
    ("diagnostics", "distributed", "verify", "measure"),
    ("integrations", "training"),
    ("calibration",),
    ("cli",),
    ("__init__", "__main__"),
)
"""From the lowest; modules of one layer may import each other, without circles."""
FACE = {"cli", "verify", "measure", "integrations"}
"""What stands above the package's face and may say ``import vsa``."""


def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name, ``vsa`` left out."""
    found = {}
    for file in sorted((TREE / "vsa").rglob("*.py")):
        name = ".".join(file.relative_to(TREE / "vsa").with_suffix("").parts)
        found[name.removesuffix(".__init__")] = ast.parse(file.read_text())
    return found


def imports(tree: ast.Module, names: set[str]) -> Iterator[str]:
    """Modules of the package that a module imports anywhere; "" is the package itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            source = node.module.split(".")
            if source[0] != "vsa" or source[1:] == ["_C"]:
                continue
            for alias in node.names:
                if alias.name == "_C":  # the compiled part lies below all of it
                    continue
                path = ".".join([*source[1:], alias.name])
                yield path if path in names else ".".join(source[1:])
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "vsa" and alias.name != "vsa._C":
                    yield ".".join(alias.name.split(".")[1:])
        elif isinstance(node, ast.ImportFrom):
            pytest.fail("an import relative to a folder hides its layer")


def graph(found: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Imports of every module."""
    return {name: set(imports(tree, set(found))) - {name} for name, tree in found.items()}


def room(name: str) -> str:
    return name.split(".")[0]


def layer(name: str) -> int:
    return next(height for height, rooms in enumerate(LAYERS) if room(name) in rooms)


def wrong(edges: dict[str, set[str]]) -> list[str]:
    """Imports that point up, or reach the package's face from below it."""
    found = []
    for name, others in edges.items():
        for other in others:
            if other == "":
                if room(name) not in FACE | {"__init__", "__main__"}:
                    found.append(f"{name} imports vsa itself")
            elif layer(other) > layer(name):
                found.append(f"{name} imports {other}, which lies above it")
    return found


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Some modules that import each other in turn, or none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name not in done:
            for other in sorted(edges[name]):
                if found := visit(other, [*path, name]):
                    return found
            done.add(name)
        return []

    for name in edges:
        if found := visit(name, []):
            return found
    return []


def test_every_module_has_a_layer() -> None:
    assert {room(name) for name in modules()} == {name for rooms in LAYERS for name in rooms}


def test_imports_point_down() -> None:
    assert wrong(graph(modules())) == []


def test_no_circles() -> None:
    edges = graph(modules())
    face = edges.pop("__init__")
    assert {room(name) for name in face} <= {name for rooms in LAYERS for name in rooms}
    below = {name: others - {""} for name, others in edges.items()}
    assert circle(below) == []


def test_what_is_wrong_is_found() -> None:
    found = modules()
    found["values.grid"] = ast.parse(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from vsa.stages import fine\n"
    )
    found["stages.fine"] = ast.parse("def f():\n    import vsa\n")
    found["nn"] = ast.parse("from vsa import schedule")
    found["schedule"] = ast.parse("from vsa.nn import VideoSparseAttention")
    edges = graph(found)
    assert sorted(wrong(edges)) == [
        "stages.fine imports vsa itself",
        "values.grid imports stages.fine, which lies above it",
    ]
    assert circle({name: edges[name] - {""} for name in edges if name != "__init__"})
