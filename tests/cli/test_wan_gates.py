# SPDX-License-Identifier: Apache-2.0
"""``vsa wan`` with the coarse gates of FastVideo's checkpoints, from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("diffusers")
from safetensors.torch import load_file, save_file
from torch import Tensor

from vsa.cli import app
from vsa.cli.wan.model import loaded_model, random_model
from vsa.integrations.diffusers import apply_vsa, gates_state_dict, load_gates

RUNNER = CliRunner(env={"COLUMNS": "160", "TERM": "dumb"})
CPU = torch.device("cpu")
FILE = "diffusion_pytorch_model.safetensors"
DIM, LAYERS = 128, 2


def wan(*arguments: object) -> Any:
    options = ["--device", "cpu", "--size", "9x64x96", "--steps", "2", *map(str, arguments)]
    result = RUNNER.invoke(app, ["wan", *options])
    words = " ".join(result.output.replace("│", " ").split())
    assert "Traceback" not in words
    return result.exit_code, words


def gates(layers: int = LAYERS, dim: int = DIM) -> dict[str, Tensor]:
    return {
        f"blocks.{layer}.to_gate_compress.{name}": torch.randn(shape)
        for layer in range(layers)
        for name, shape in (("weight", (dim, dim)), ("bias", (dim,)))
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny pipeline's folder as diffusers saves it."""
    random_model("tiny", None, CPU, torch.float32).save_pretrained(tmp_path / "transformer")
    return tmp_path


def with_gates(folder: Path, found: dict[str, Tensor]) -> Path:
    """The same with gates among the weights, as FastVideo saves it."""
    file = folder / "transformer" / FILE
    save_file({**load_file(file), **found}, file)
    return folder


def test_a_checkpoint_with_gates_runs_with_the_coarse_branch(folder: Path, tmp_path: Path) -> None:
    found, file = {}, tmp_path / "wan.json"
    for kind, wanted in (("without", None), ("with", "coarse")):
        if wanted:
            with_gates(folder, gates())
        code, words = wan("--weights", folder, "--topk", 1.0, "--json", file)
        assert code == 0, words
        found[kind] = json.loads(file.read_text())
        assert found[kind]["gates"] == wanted
        assert ("coarse branch behind the gates of" in words) == (wanted is not None)
    without, gated = found["without"], found["with"]
    assert gated["gates_from"] == str(folder) and without["gates_from"] is None
    assert gated["tile"] == [4, 4, 4] and without["tile"] == "auto"
    # With every tile kept only the coarse branch is left to make a difference.
    assert without["rows"][0]["difference"] < 1e-4 < gated["rows"][0]["difference"]
    assert gated["rows"][0]["sparse"]["stages_ms"]["combine"] > 0


def test_a_file_of_gates_is_added_to_any_model(folder: Path, tmp_path: Path) -> None:
    file, page = tmp_path / "gates.safetensors", tmp_path / "wan.png"
    # diffusers' own naming, under a prefix
    named = {f"transformer.{k.replace('.to_', '.attn1.to_')}": v for k, v in gates().items()}
    save_file(named, file)
    for model in (["--tiny"], ["--weights", folder]):
        code, words = wan(*model, "--gates", file, "--topk", 1.0, "--report", page)
        assert code == 0 and "behind the gates of" in words and page.exists(), words
        assert "differ by 0.0%" not in words
    code, words = wan("--weights", with_gates(folder, gates()), "--gates", file)
    assert code == 2 and "holds gates of its own: leave --gates out" in words


@torch.no_grad()
def test_gates_of_a_folder_are_those_that_were_saved(folder: Path) -> None:
    saved = gates()
    model, found = loaded_model(with_gates(folder, saved), CPU, torch.float32)
    load_gates(apply_vsa(model, topk=1, gates="coarse"), found)
    kept = gates_state_dict(model)
    assert kept.keys() == saved.keys() and all(torch.equal(kept[k], saved[k]) for k in saved)
    model.save_pretrained(folder / "again")  # gates now lie in attn1
    _, again = loaded_model(folder / "again", CPU, torch.float32)
    assert again.keys() == saved.keys() and all(torch.equal(again[k], saved[k]) for k in saved)


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (gates(1), "state_dict lacks blocks.1.to_gate_compress.bias, blocks.1"),
        (gates(3), "the transformer has no layer for blocks.2.to_gate_compress.bias"),
        (gates(dim=64), "holds blocks.0.to_gate_compress"),
    ],
    ids=["missing", "extra", "misshapen"],
)
def test_gates_that_do_not_fit_are_refused_before_the_run(
    bad: dict[str, Tensor], sentence: str, folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "gates.safetensors"
    save_file(bad, file)
    for option, arguments in (
        ("--gates", ["--tiny", "--gates", file]),
        ("--weights", ["--weights", with_gates(folder, bad)]),
    ):
        code, words = wan(*arguments)
        assert code == 2 and f"{option}: the gates of" in words and sentence in words, words


def test_files_that_are_none_are_refused(folder: Path, tmp_path: Path) -> None:
    code, words = wan("--tiny", "--gates", folder / "transformer" / FILE)
    assert code == 2 and "but it has no gates" in words
    broken = tmp_path / "broken.safetensors"
    broken.write_text("text")
    code, words = wan("--tiny", "--gates", broken)
    assert code == 2 and "must be a safetensors file, but reading it fails" in words
    (folder / "transformer" / FILE).write_text("text")
    code, words = wan("--weights", folder)
    assert code == 2 and "must be a safetensors file" in words
