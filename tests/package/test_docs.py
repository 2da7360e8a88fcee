# SPDX-License-Identifier: Apache-2.0
"""README.md and the pages of docs/: their code runs, and what they name exists."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import torch.distributed as dist
import typer.main

import vsa
from vsa.cli import app

TREE = Path(__file__).resolve().parents[2]
PAGES = [TREE / "README.md", TREE / "CONTRIBUTING.md", *sorted((TREE / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)")
ROOMS = ("vsa", "csrc", "tests", "bench", "examples", "third_party", "docs")
NAMED = re.compile(rf"`(?:python )?((?:{'|'.join(ROOMS)})/[\w./-]*)[ `]")


def name_of(page: Path) -> str:
    return str(page.relative_to(TREE))


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """Line number and text of a page's fenced blocks in one language."""
    text = page.read_text()
    for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text[: match.start(1)].count("\n"), match[1]


def commands(page: Path) -> list[list[str]]:
    """The words of every command in a page's shell blocks; variables set before it are dropped."""
    lines = [line for _, block in blocks(page, "bash") for line in block.splitlines()]
    parts = [part for line in lines for part in line.split("&&")]
    words = [shlex.split(part, comments=True) for part in parts]
    return [each[next(i for i, word in enumerate(each) if "=" not in word) :] for each in words]


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What torchrun tells a process that is alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here = dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for key, value in here.items():
        monkeypatch.setenv(key, value)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def run(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's Python, all blocks as one program, in a folder for what it writes."""
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": page.stem}
    for line, code in blocks(page, "python"):
        exec(compile("\n" * line + code, str(page), "exec"), names)


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.stem != "tutorial" and any(blocks(page, "python"))],
    ids=name_of,
)
def test_python_of_a_page_runs_from_top_to_bottom(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_process: None
) -> None:
    if "diffusers" in "".join(code for _, code in blocks(page, "python")):
        pytest.importorskip("diffusers")
    run(page, tmp_path, monkeypatch)


def test_the_tutorial_prints_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(TREE / "docs" / "tutorial.md", tmp_path, monkeypatch)
    printed = capsys.readouterr().out
    shown = [text for _, text in blocks(TREE / "docs" / "tutorial.md", "text")]
    assert shown and [text for text in shown if text not in printed] == []


def test_commands_and_their_options_exist() -> None:
    group: Any = typer.main.get_command(app)
    seen = set()
    for page in PAGES:
        for words in commands(page):
            if words[0] != "vsa" or len(words) == 1 or words[1].startswith("-"):
                continue
            assert words[1] in group.commands, f"{name_of(page)}: vsa {words[1]}"
            known = {o for param in group.commands[words[1]].params for o in param.opts}
            used = {word for word in words[2:] if re.match(r"--?[a-z]", word)}
            assert used <= known, f"{name_of(page)}: vsa {words[1]} has no {sorted(used - known)}"
            seen.add(words[1])
    assert seen == set(group.commands), "every command is shown on a page"


def test_scripts_of_commands_exist() -> None:
    scripts = [
        words[1]
        for page in PAGES
        for words in commands(page)
        if words[0].startswith("python") and words[1].endswith(".py")
    ]
    assert scripts and [script for script in scripts if not (TREE / script).is_file()] == []


@pytest.mark.parametrize("page", [*PAGES, TREE / "CHANGELOG.md"], ids=name_of)
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text()
    broken = [to for to in LINK.findall(text) if not (page.parent / to).exists()]
    missing = [path for path in NAMED.findall(text) if not any(TREE.glob(path))]
    assert (broken, missing) == ([], [])


def test_the_tree_of_the_readme_is_the_tree() -> None:
    ((_, tree),) = blocks(TREE / "README.md", "text")
    parent, missing = Path(), []
    for line in tree.splitlines():
        paths = line.strip().split("  ")[0].split(", ")
        if not line.startswith(" "):
            parent = Path(paths[0])
        inside = [TREE / parent / path if line.startswith(" ") else TREE / path for path in paths]
        missing += [str(path) for path in inside if not path.exists()]
    assert missing == []


def test_readme_is_short() -> None:
    assert len((TREE / "README.md").read_text().split()) <= 1300


def test_pages_and_changelog_are_of_this_version() -> None:
    version = importlib.metadata.version("video-sparse-attention")
    newest = re.search(r"^## (\S+)", (TREE / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None and newest[1] == version
    assert f"Status: {version}," in (TREE / "README.md").read_text()


def test_every_public_name_has_a_place_in_the_reference() -> None:
    reference = "\n".join(page.read_text() for page in (TREE / "docs" / "api").glob("*.md"))
    shown = set(re.findall(r"^::: vsa\.(\w+)", reference, re.MULTILINE))
    assert set(vsa.__all__) <= shown


def test_every_diagram_is_well_formed_titled_and_shown() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    diagrams = list((TREE / "docs" / "diagrams").glob("*.svg"))
    assert diagrams
    for diagram in diagrams:
        root = ElementTree.parse(diagram).getroot()
        assert root.find("{http://www.w3.org/2000/svg}title") is not None, diagram.name
        assert f"diagrams/{diagram.name}" in text, f"no page shows {diagram.name}"
