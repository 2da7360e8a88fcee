# SPDX-License-Identifier: Apache-2.0
"""One palette for all pictures, and a picture in its style."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from matplotlib import rcParams
from matplotlib.image import imread

from vsa.diagnostics import theme

ROOT = Path(__file__).resolve().parents[2]


def test_colours_stand_in_the_theme_alone() -> None:
    files = [*(ROOT / "vsa").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
    assert len(files) > 50
    for path in files:
        if path != ROOT / "vsa" / "diagnostics" / "theme.py":
            found = re.findall(r"[\"'](#[0-9a-fA-F]{3,6}|0\.\d)[\"']|rcParams", path.read_text())
            assert not found, f"{path}: {found}"


def test_what_stands_in_one_picture_has_colours_of_its_own() -> None:
    together = [*theme.STAGES, *theme.DIRECTIONS.values(), theme.PALE, theme.INK, theme.MUTED]
    together += [theme.TEAL, theme.PINK]
    assert len(set(together)) == len(together)


def test_a_figure_has_its_size_and_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    before = dict(rcParams)
    path = tmp_path / "x.png"
    with theme.new_figure(4, 2, path) as figure:
        axes = figure.subplots()
        axes.plot([0, 1], label="a line")
        assert not axes.spines["top"].get_visible()
        theme.legend_above(axes)
        theme.title(figure, "what it shows")
    assert imread(path).shape[:2] == (2 * theme.DPI, 4 * theme.DPI)
    assert dict(rcParams) == before
