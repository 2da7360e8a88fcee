# SPDX-License-Identifier: Apache-2.0
"""The import name: shared with another distribution, and with the folder of sources in a clone."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Protocol

import pytest
from torch_alone import Server

import vsa
from video_sparse_attention import DISTRIBUTION, FOREIGN, KEPT, digest_of_sources
from vsa import installation

PACKAGE = Path(vsa.__file__).parent
LAUNCHER = Path(sys.modules["video_sparse_attention"].__file__)
THEIRS = {
    # FastVideo's own asks for a GPU while it is imported, so it fails elsewhere.
    "vsa/__init__.py": b"raise RuntimeError('no GPU for the other one')\n",
    "vsa/index.py": b"INDEX = 1\n",
}
COMMAND = "from video_sparse_attention import main; main()"


def install(site: Path, name: str, version: str, files: dict[str, bytes]) -> None:
    """What pip leaves: files, whoever had them before, metadata, and a record with hashes."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    summary = "Kernels of someone else" if name == FOREIGN else "Ours"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: {summary}\n"
    record = ""
    for path, content in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_bytes(content)
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(content)}\n"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(metadata)
    (info / "RECORD").write_text(record)


def uninstall(site: Path, name: str) -> None:
    (info,) = site.glob(f"{name.replace('-', '_')}-*.dist-info")
    for line in (info / "RECORD").read_text().splitlines():
        (site / line.split(",")[0]).unlink()
    shutil.rmtree(info)


def ours(keeps: bool = False) -> dict[str, bytes]:
    """Files of the package; a wheel keeps a copy of its face, a build in place does not."""
    found = {f"vsa/{path.relative_to(PACKAGE)}": path for path in PACKAGE.rglob("*.py")}
    found |= {f"vsa/{path.name}": path for path in PACKAGE.glob("_C*.so")}
    found["vsa/_build.json"] = PACKAGE / "_build.json"
    found["video_sparse_attention.py"] = LAUNCHER
    if keeps:
        found[KEPT] = PACKAGE / "__init__.py"
    return {name: path.read_bytes() for name, path in found.items()}


class Python(Protocol):
    """Runs an interpreter with what lies in a folder before all else."""

    def __call__(
        self, site: Path, *arguments: str, cwd: Path | str = "/"
    ) -> subprocess.CompletedProcess[str]: ...


@pytest.fixture(scope="module")
def python() -> Iterator[Python]:
    """A new one where it is given options of its own; else one that has imported PyTorch."""
    server = Server()

    def run(site: Path, *arguments: str, cwd: Path | str = "/") -> subprocess.CompletedProcess[str]:
        if arguments[0] in ("-c", "-m"):
            return server.run(site, *arguments, cwd=cwd)
        environment = {**os.environ, "PYTHONPATH": str(site), "COLUMNS": "400"}
        command = [sys.executable, *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)

    yield run
    server.close()


def test_installed_after_ours_the_other_one_is_named_by_every_command(
    python: Python, tmp_path: Path
) -> None:
    install(tmp_path, DISTRIBUTION, "0.2.0", ours())
    install(tmp_path, FOREIGN, "0.0.5", THEIRS)
    done = python(tmp_path, "-c", COMMAND, "info")
    assert done.returncode == 1 and done.stderr == ""
    for words in (
        "0.2.0, but not whole",
        f"{tmp_path / 'vsa' / '__init__.py'} was overwritten by the distribution vsa 0.0.5",
        "Kernels of someone else",
        f"pip uninstall -y vsa {DISTRIBUTION}",
        "PyTorch",
    ):
        assert words in done.stdout
    other = python(tmp_path, "-c", COMMAND, "bench")
    assert other.returncode == 1 and other.stdout == ""
    assert other.stderr.count("\n") == 1 and "was overwritten by" in other.stderr


def test_uninstalling_the_other_one_leaves_a_hole_that_is_named(
    python: Python, tmp_path: Path
) -> None:
    install(tmp_path, FOREIGN, "0.0.5", THEIRS)
    install(tmp_path, DISTRIBUTION, "0.2.0", ours())
    uninstall(tmp_path, FOREIGN)
    done = python(tmp_path, "-S", "-c", COMMAND, "info")  # no other package of ours behind it
    assert done.returncode == 1 and "vsa/__init__.py" in done.stdout and "is missing" in done.stdout


CALLS = (
    "import torch, vsa; from vsa import video_sparse_attn, block_sparse_attn\n"
    "x, sizes = torch.ones(1, 1, 128, 16), torch.tensor([64, 9])\n"
    "out = video_sparse_attn(x, x, x, variable_block_sizes=sizes, topk=1, block_size=(4, 4, 4))\n"
    "kept = torch.ones(1, 1, 2, 2, dtype=torch.bool)\n"
    "print(vsa.__file__, float(out[0, 0, 0, 0]), *block_sparse_attn(x, x, x, kept, sizes)[0].shape)"
)
"""Import lines and calls of a host of the other one's functions."""


@pytest.mark.parametrize("order", ["overwritten", "removed"])
def test_one_command_makes_it_right(python: Python, order: str, tmp_path: Path) -> None:
    """Both stay installed, and the other one's functions are ours."""
    first = (DISTRIBUTION, "0.2.0", ours(keeps=True)), (FOREIGN, "0.0.4", THEIRS)
    for name, version, files in first if order == "overwritten" else reversed(first):
        install(tmp_path, name, version, files)
    if order == "removed":
        uninstall(tmp_path, FOREIGN)
    broken = python(tmp_path, "-S", "-c", COMMAND, "info")
    assert broken.returncode == 1 and "run: vsa mend" in broken.stdout
    assert ("both distributions stay" in broken.stdout) == (order == "overwritten")
    mended = python(tmp_path, "-S", "-c", COMMAND, "mend")
    assert mended.returncode == 0 and mended.stderr == "", mended.stderr
    assert "is that of video-sparse-attention again" in mended.stdout
    assert ("with vsa 0.0.4" in mended.stdout) == (order == "overwritten")
    done = python(tmp_path, "-c", CALLS)
    assert done.stdout.split() == [f"{tmp_path}/vsa/__init__.py", "2.0", "1", "1", "128", "16"]
    again = python(tmp_path, "-c", COMMAND, "mend")
    assert again.returncode == 0 and "nothing to mend" in again.stdout


def test_beside_the_other_one_its_functions_are_ours(python: Python, tmp_path: Path) -> None:
    """As in an environment of SGLang, whose extra installs the other one first."""
    install(tmp_path, FOREIGN, "0.0.4", THEIRS)
    install(tmp_path, DISTRIBUTION, "0.2.0", ours(keeps=True))
    done = python(tmp_path, "-c", CALLS)
    assert done.stdout.split()[0] == f"{tmp_path}/vsa/__init__.py", done.stderr


def test_without_a_copy_to_put_back_mend_says_what_to_run(python: Python, tmp_path: Path) -> None:
    for files in (ours(), ours(keeps=True) | {KEPT: b"changed"}):
        site = tmp_path / str(len(files))
        install(site, DISTRIBUTION, "0.2.0", files)
        if KEPT in files:
            (site / KEPT).write_bytes(b"not what was installed")
        install(site, FOREIGN, "0.0.4", THEIRS)
        done = python(site, "-c", COMMAND, "mend")
        assert done.returncode == 1 and f"pip uninstall -y vsa {DISTRIBUTION}" in done.stderr


def test_before_an_editable_installation_the_other_one_alone_is_to_go(
    python: Python, tmp_path: Path
) -> None:
    """Its package lies in site-packages, which Python looks into before it looks into clones."""
    install(tmp_path, DISTRIBUTION, "0.2.0", {"video_sparse_attention.py": LAUNCHER.read_bytes()})
    install(tmp_path, FOREIGN, "0.0.4", THEIRS)
    for command in ("mend", "info"):
        done = python(tmp_path, "-c", COMMAND, command)
        said = done.stdout + done.stderr
        assert done.returncode == 1 and "before the editable installation" in said
        assert "run: pip uninstall -y vsa (no file of this project goes with it" in said


def test_a_wheel_keeps_a_copy_of_its_face() -> None:
    kept = PACKAGE / Path(KEPT).name
    if not kept.is_file():
        pytest.skip("vsa was built in place, which keeps none")
    assert kept.read_bytes() == (PACKAGE / "__init__.py").read_bytes()


def test_installed_before_ours_the_other_one_is_stated_and_ours_works(
    python: Python, tmp_path: Path
) -> None:
    install(tmp_path, FOREIGN, "0.0.5", THEIRS)
    install(tmp_path, DISTRIBUTION, "9.9.9", ours())
    for command in (["-c", COMMAND, "info"], ["-m", "vsa", "info"]):
        done = python(tmp_path, *command)
        assert done.returncode == 0, done.stderr
        assert f"9.9.9, in {tmp_path / 'vsa'}" in done.stdout
        assert done.stdout.count("vsa 0.0.5 (Kernels of someone else)") == 1
        assert "hopper" in done.stdout


def test_any_file_that_the_other_one_overwrote_stops_the_import(
    python: Python, tmp_path: Path
) -> None:
    install(tmp_path, DISTRIBUTION, "0.2.0", ours())
    install(tmp_path, FOREIGN, "0.0.5", {"vsa/nn.py": b"Grid = None\n"})
    done = python(tmp_path, "-c", "import vsa")
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert said.startswith("ImportError:") and "nn.py was overwritten by" in said


def test_the_version_is_that_of_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name != installed:
            raise PackageNotFoundError(name)
        return "1.2.3"

    monkeypatch.setattr(installation, "version", version)
    installed = DISTRIBUTION
    assert installation.installed_version() == "1.2.3"
    installed = "nothing"
    with pytest.raises(ImportError, match=r"pip install \."):
        installation.installed_version()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Sources as git gives them: nothing is built in their folder."""
    root = tmp_path / "clone"
    shutil.copytree(PACKAGE, root / "vsa", ignore=shutil.ignore_patterns("_C*.so", "_build.json"))
    shutil.copy(LAUNCHER, root)
    (root / "pyproject.toml").touch()
    return root


def test_in_a_clone_the_installed_package_is_met(
    python: Python, tmp_path: Path, clone: Path
) -> None:
    site = tmp_path / "site"
    install(site, DISTRIBUTION, "9.9.9", ours())
    code = (
        "import vsa.cost, vsa; print(vsa.__file__, vsa.cost.__file__, vsa.Grid((4, 4, 4)).tokens)"
    )
    done = python(site, "-c", code, cwd=clone)
    assert done.stdout.split() == [f"{site}/vsa/__init__.py", f"{site}/vsa/cost.py", "64"]
    assert done.stderr == ""
    inside, outside = (
        python(site, "-m", "vsa", "info", cwd=clone),
        python(site, "-c", COMMAND, "info"),
    )
    assert inside.stdout == outside.stdout and f"in {site}/vsa" in inside.stdout


def test_sources_that_differ_from_what_is_installed_are_named(
    python: Python, tmp_path: Path, clone: Path
) -> None:
    site = tmp_path / "site"
    install(site, DISTRIBUTION, "9.9.9", ours())
    with (clone / "vsa" / "values" / "grid.py").open("a") as file:
        file.write("CHANGED = True\n")
    done = python(site, "-c", "import vsa; print(hasattr(vsa.values.grid, 'CHANGED'))", cwd=clone)
    assert done.stdout == "False\n"
    assert done.stderr.count("UserWarning") == 1 and "1 of their files differ" in done.stderr


def test_sources_that_were_built_in_place_are_imported(
    python: Python, tmp_path: Path, clone: Path
) -> None:
    site = tmp_path / "site"
    install(site, DISTRIBUTION, "9.9.9", ours())
    (clone / "vsa" / "_build.json").write_text('{"compiled": false, "cuda": false, "why": "test"}')
    done = python(site, "-c", "import vsa; print(vsa.__file__)", cwd=clone)
    assert done.stdout.strip() == f"{clone}/vsa/__init__.py" and done.stderr == ""


def test_kernels_of_other_sources_than_those_beside_them_are_named(
    python: Python, tmp_path: Path, clone: Path
) -> None:
    install(tmp_path / "site", DISTRIBUTION, "9.9.9", ours())
    (clone / "csrc").mkdir()
    source = clone / "csrc" / "kernel.h"
    source.write_text("old")
    facts = {"compiled": True, "sources": digest_of_sources(clone / "csrc")}
    (clone / "vsa" / "_build.json").write_text(json.dumps(facts))
    assert python(tmp_path / "site", "-c", "import vsa", cwd=clone).stderr == ""
    source.write_text("new")
    said = python(tmp_path / "site", "-c", "import vsa", cwd=clone).stderr
    assert said.count("UserWarning") == 1
    assert f"{clone}/csrc holds now" in said and f"run pip install -e . again in {clone}" in said


def test_a_clone_without_an_installed_package_says_what_to_run(python: Python, clone: Path) -> None:
    code = "import sys; sys.path[:] = [sys.argv[1], *(p for p in sys.path if 'site-' not in p)]\n"
    done = python(clone, "-c", f"{code}import vsa", str(clone))
    said = done.stderr.splitlines()[-1]
    assert said.startswith("ImportError: vsa is imported from its sources in")
    assert f"pip install . (or pip install -e .) in {clone}" in said


def test_commands_in_such_a_clone_end_with_a_sentence(python: Python, clone: Path) -> None:
    info = python(clone, "-S", "-m", "vsa", "info", cwd=clone)
    assert info.returncode == 1 and info.stderr == ""
    assert f"sources in {clone / 'vsa'}, which were not built" in info.stdout
    assert "PyTorch" in info.stdout
    other = python(clone, "-S", "-m", "vsa", "demo", cwd=clone)
    assert other.returncode == 1 and other.stdout == ""
    assert other.stderr.startswith("vsa: ") and other.stderr.count("\n") == 1
    # Whoever imports vsa gets an error to catch, also inside of a command of another name.
    (clone / "other.py").write_text("try:\n import vsa\nexcept ImportError:\n print('caught')\n")
    done = python(clone, "-S", "-m", "other", "vsa", cwd=clone)
    assert done.stdout == "caught\n", done.stderr
