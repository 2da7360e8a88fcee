# SPDX-License-Identifier: Apache-2.0
"""The pages of bench/: a question and its answer first, links and commands that exist."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import forked
import pytest
from typer.testing import CliRunner

from vsa.cli import app

BENCH = Path(__file__).resolve().parents[2] / "bench"
LOG = sorted(path for path in (BENCH / "log").glob("*.md") if path.name != "README.md")
PAGES = [*sorted(BENCH.glob("*.md")), BENCH / "log" / "README.md", *LOG]
LEFT = {"bench/fine.py", "bench/grids.py", "bench/routing.py"}
"""Scripts of older commits, which lines that name them have to name too."""


@pytest.mark.parametrize("page", LOG, ids=lambda path: path.stem)
def test_a_page_of_the_log_asks_and_answers_at_once(page: Path) -> None:
    title, empty, *answer = page.read_text().splitlines()[:5]
    assert re.fullmatch(r"# .*\?", title) and not empty
    assert all((line and line[0] not in "#|-`") or line.startswith("`vsa") for line in answer)
    index = (BENCH / "log" / "README.md").read_text()
    assert f"| {title.removeprefix('# ')} | [{page.name}]({page.name}) |" in index


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_links_and_scripts_are_there(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\s(tests/[\w/.]+)", text):
        assert (BENCH.parent / target).exists(), target
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (page.parent / target).exists(), target
    for line in text.splitlines():
        for script in re.findall(r"bench/\w+\.(?:py|cu|md)", line):
            if script in LEFT or script == "bench/NOTES.md":
                assert "commit" in line or re.search(r"\b[0-9a-f]{7}\b", line), line
            else:
                assert (BENCH.parent / script).is_file(), script


def commands() -> list[tuple[str, list[str]]]:
    """What the pages tell people to run: the program, and the options that it is given."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S):
            for line in block.splitlines():
                if match := re.search(
                    r"(?:^|\s)(?:python (bench/\S+)|vsa (bench|check|profile|wan))", line
                ):
                    words = line[match.end() :].split()
                    options = [word.split("=")[0] for word in words if word.startswith("--")]
                    found.append((match[1] or f"vsa {match[2]}", options))
    return found


@cache
def help_of(program: str) -> str:
    if program.startswith("vsa "):
        return (
            CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})
            .invoke(app, [program.removeprefix("vsa "), "--help"])
            .output
        )
    done = forked.run(BENCH.parent / program, "--help")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_commands_exist_and_know_their_options() -> None:
    assert len(commands()) > 12
    for program, options in commands():
        for option in options:
            assert re.search(rf"{option}\b", help_of(program)), f"{program} {option}"


def test_results_stay_short() -> None:
    by_hand = (BENCH / "RESULTS.md").read_text()
    assert len(by_hand.split()) < 1500 and "<!-- tables" not in by_hand
