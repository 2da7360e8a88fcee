# SPDX-License-Identifier: Apache-2.0
"""Checkpoints between FastVideo's names and diffusers': there, back, and refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

pytest.importorskip("diffusers")
import diffusers
from integrations.tiny_transformers import HEAD_DIM, HEADS, run, wan, wan_image_to_video
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vsa.cli import app
from vsa.cli.wan.model import loaded_model
from vsa.integrations.checkpoints.names import H3, NAMINGS, WAN, Model, Naming, read, template
from vsa.integrations.diffusers import apply_vsa, gates_state_dict, load_gates

RUNNER = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})
DIM = HEADS * HEAD_DIM
FACTS = json.loads((Path(__file__).parent / "fastvideo_names.json").read_text())
FILE = "diffusion_pytorch_model.safetensors"


def h3() -> torch.nn.Module:
    return diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        ffn_dim=32,
        in_channels=4,
        audio_in_channels=4,
        text_dim=16,
        freq_dim=16,
        time_embed_hidden_dim=16,
        time_embed_dim=8,
        rope_freq_dim=4,
    )


def wan_gates(prefix: str = "") -> dict[str, Tensor]:
    return {
        f"blocks.{layer}.{prefix}to_gate_compress.{name}": torch.randn(shape)
        for layer in range(2)
        for name, shape in (("weight", (DIM, DIM)), ("bias", (DIM,)))
    }


def h3_gates(block: str = "transformer_blocks", name: str = "weight") -> dict[str, Tensor]:
    return {
        f"{block}.{layer}.attn.to_gate_compress.{name}": torch.randn(DIM, 32) for layer in range(2)
    }


MODELS: dict[str, Any] = {
    "Wan": lambda: wan()[0].state_dict(),
    "Wan with gates": lambda: wan()[0].state_dict() | wan_gates(),
    "Wan image to video": lambda: wan_image_to_video()[0].state_dict(),
    "MiniMax-H3": lambda: h3().state_dict(),
    "MiniMax-H3 with gates": lambda: h3().state_dict() | h3_gates(),
}


def theirs(model: str, name: str) -> str:
    """FastVideo's name, by the facts of its wheel: compare_fastvideo_names.py."""
    pattern, number = template(name)
    return FACTS[model][pattern].replace(".N.", f".{number}.")


def convert(*arguments: object) -> tuple[int, str]:
    result = RUNNER.invoke(app, ["convert", *map(str, arguments)])
    words = " ".join(result.output.replace("│", " ").split())
    assert "Traceback" not in words
    return result.exit_code, words


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    same = found.keys() == wanted.keys()
    return same and all(
        found[name].dtype == value.dtype and torch.equal(found[name], value)
        for name, value in wanted.items()
    )


@pytest.mark.parametrize("kind", MODELS)
def test_the_names_are_those_of_both_libraries(kind: str) -> None:
    model = H3 if "H3" in kind else WAN
    state = MODELS[kind]()
    reading = read(state)
    assert (reading.model, reading.naming) == (model, "diffusers")
    assert len(reading.gates) == (0 if "gates" not in kind else 2 if model is H3 else 4)
    own = reading.in_naming("fastvideo")
    assert own == {name: theirs(model.title, name) for name in state}
    back = read(own.values())
    assert back.naming == "fastvideo" and back.in_naming("diffusers") == {
        new: old for old, new in own.items()
    }


@pytest.mark.parametrize("kind", MODELS)
def test_there_and_back_is_equal_bit_for_bit(kind: str, tmp_path: Path) -> None:
    state = {
        name: value.to(torch.bfloat16 if "attn" in name else torch.float32)
        for name, value in MODELS[kind]().items()
    }
    save_file(state, tmp_path / "a.safetensors", metadata={"format": "pt", "step": "7"})
    for source, goal, to in (("a", "b", "fastvideo"), ("b", "c", "diffusers")):
        code, words = convert(
            tmp_path / f"{source}.safetensors", tmp_path / f"{goal}.safetensors", "--to", to
        )
        assert code == 0 and f"{len(state)} tensors" in words, words
    there, back = (load_file(tmp_path / f"{name}.safetensors") for name in "bc")
    title = H3.title if "H3" in kind else WAN.title
    assert equal(there, {theirs(title, name): value for name, value in state.items()})
    assert equal(back, state)
    with safe_open(tmp_path / "c.safetensors", framework="pt") as held:
        assert held.metadata() == {"format": "pt", "step": "7"}
    assert sorted(each.name for each in tmp_path.iterdir()) == [f"{x}.safetensors" for x in "abc"]


@torch.no_grad()
def test_shards_with_an_index_load_into_a_model_with_equal_outputs(tmp_path: Path) -> None:
    model, inputs = wan()
    inputs = {**inputs, "encoder_hidden_states": torch.randn(2, 5, 16)}
    apply_vsa(model, topk=2, gates="coarse")
    for block in model.blocks:
        torch.nn.init.normal_(block.attn1.to_gate_compress.weight)
    wanted, gates = run(model, inputs), gates_state_dict(model)
    model.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    for source, goal, to in (("saved", "own", "fastvideo"), ("own", "theirs", "diffusers")):
        code, words = convert(tmp_path / source, tmp_path / goal, "--to", to)
        assert code == 0 and "4 of gates" in words, words
        assert {each.name for each in (tmp_path / goal).iterdir()} == {
            each.name for each in (tmp_path / source).iterdir()
        }
    index = json.loads((tmp_path / "own" / f"{FILE}.index.json").read_text())
    assert "blocks.1.to_gate_compress.bias" in index["weight_map"]
    assert "blocks.1.self_attn_residual_norm.norm.weight" in index["weight_map"]
    # diffusers loads what has been there and back, and finds its gates beside it
    loaded = type(model).from_pretrained(tmp_path / "theirs")
    assert torch.equal(run(apply_vsa(loaded, topk=2, gates="coarse"), inputs), wanted)
    # vsa wan --weights reads FastVideo's own names as they are
    for folder in ("saved", "own", "theirs"):
        read_by_wan, found = loaded_model(tmp_path / folder, torch.device("cpu"), torch.float32)
        load_gates(apply_vsa(read_by_wan, topk=2, gates="coarse"), found)
        assert torch.equal(run(read_by_wan, inputs), wanted)
        assert equal(found, gates)


@pytest.mark.parametrize(
    ("state", "wanted"),
    [
        (wan_gates("attn1.") | wan()[0].state_dict(), wan_gates()),
        (h3_gates("blocks"), h3_gates()),
        (h3_gates(name="set_weight") | {"proj_in.diff": torch.ones(3)}, h3_gates()),
    ],
    ids=["of a model", "repackaged", "of an adapter"],
)
def test_gates_are_taken_alone(
    state: dict[str, Tensor], wanted: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file(state, tmp_path / "a.safetensors")
    code, words = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--to", "gates")
    assert code == 0 and f"{len(wanted)} tensors" in words, words
    found = load_file(tmp_path / "b.safetensors")
    assert found.keys() == wanted.keys()
    given = [value for name, value in state.items() if "to_gate_compress" in name]
    assert all(torch.equal(found[name], value) for name, value in zip(wanted, given, strict=True))


def without(state: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key != name}


def fastvideo(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {theirs("Wan", name): value for name, value in state.items()}


GATED = wan()[0].state_dict() | wan_gates()
BAD: dict[str, tuple[Any, str]] = {
    "unknown": (GATED | {"blocks.0.attn3.bias": torch.ones(1)}, r"blocks\.0\.attn3\.bias, which"),
    "mixed": (
        without(GATED, "proj_out.bias") | {"blocks.0.to_q.bias": torch.ones(DIM)},
        "blocks.0.to_q.bias, which mixes FastVideo's own naming into diffusers'",
    ),
    "missing": (without(GATED, "blocks.1.norm2.bias"), r"Wan lacks blocks\.1\.norm2\.bias$"),
    "missing gate": (
        without(GATED, "blocks.0.to_gate_compress.bias"),
        r"lacks blocks\.0\.to_gate_compress\.bias, as its gates parts are there",
    ),
    "block": (
        {k: v for k, v in fastvideo(wan(num_layers=3)[0].state_dict()).items() if ".1." not in k},
        r"Wan lacks blocks\.1\.attn1\.to_q\.weight",
    ),
    "half of image to video": (
        without(wan_image_to_video()[0].state_dict(), "blocks.0.attn2.norm_added_k.weight"),
        r"norm_added_k\.weight, as its image to video parts are there",
    ),
    "twice": (GATED | wan_gates("attn1."), "are the same parameter of Wan"),
    "adapter": (
        h3_gates(name="set_weight") | {"transformer_blocks.0.attn.to_q.lora_A": torch.ones(1)},
        "an adapter: merge it",
    ),
    "another model": ({"layers.0.weight": torch.ones(1)}, "none of which is a name of Wan or"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_unknown_or_missing_is_refused_and_nothing_is_written(
    kind: str, tmp_path: Path
) -> None:
    state, sentence = BAD[kind]
    with pytest.raises(ValueError, match=sentence):
        read(state)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "a.safetensors")
    code, words = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert (code == 2 and "the checkpoint" in words) or "are the same" in words, words
    assert [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]


def test_files_that_are_damaged_or_in_the_way_are_refused(tmp_path: Path) -> None:
    good, goal = tmp_path / "good.safetensors", tmp_path / "goal.safetensors"
    save_file(fastvideo(GATED), good)
    raw = good.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    for bad, sentence in (
        (raw[:-4], "is damaged: it has"),
        (raw + b"more", "is damaged: it has"),
        (raw[: 8 + length // 2], "cannot be read as a safetensors file"),
        (b"\xff" * 16, "cannot be read as a safetensors file: its header would have"),
        (b"", "cannot be read as a safetensors file"),
    ):
        (tmp_path / "bad.safetensors").write_bytes(bad)
        code, words = convert(tmp_path / "bad.safetensors", goal)
        assert code == 2 and sentence in words and not goal.exists(), words
    for place, sentence in (
        (good, "exists already"),
        (tmp_path / "no" / "goal.safetensors", "which is none"),
    ):
        code, words = convert(good, place)
        assert code == 2 and sentence in words, words
    code, words = convert(good, goal, "--to", "fastvideo")
    assert code == 2 and "are those of fastvideo already" in words, words
    code, words = convert(good)  # says what it would do
    assert code == 0 and "blocks.N.to_q.weight blocks.N.attn1.to_q.weight" in words, words
    assert not goal.exists() and good.read_bytes() == raw


def test_folders_whose_index_and_shards_disagree_are_refused(tmp_path: Path) -> None:
    wan()[0].save_pretrained(tmp_path / "a" / "transformer", max_shard_size="40KB")
    code, words = convert(tmp_path / "a", tmp_path / "b", "--to", "fastvideo")
    assert code == 2 and "give" in words and "transformer" in words, words
    index = tmp_path / "a" / "transformer" / f"{FILE}.index.json"
    content = json.loads(index.read_text())
    changed = json.loads(index.read_text())
    changed["weight_map"].pop("proj_out.bias")
    outside = json.loads(index.read_text())
    outside["weight_map"]["proj_out.bias"] = "../x.safetensors"
    for bad, sentence in (
        (changed, "disagree about proj_out.bias"),
        (outside, "names a shard outside of its own folder"),
        ({}, "cannot be read as an index of shards"),
    ):
        index.write_text(json.dumps(bad))
        code, words = convert(tmp_path / "a" / "transformer", tmp_path / "b", "--to", "fastvideo")
        assert code == 2 and sentence in words, words
    index.write_text(json.dumps(content))
    (tmp_path / "a" / "transformer" / content["weight_map"]["proj_out.bias"]).unlink()
    code, words = convert(tmp_path / "a" / "transformer", tmp_path / "b", "--to", "fastvideo")
    assert code == 2 and "cannot be read as a safetensors file" in words
    assert not (tmp_path / "b").exists()


def test_a_disk_that_fails_midway_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vsa.integrations.checkpoints import files

    save_file(GATED, tmp_path / "a.safetensors")
    calls = []

    def failing(source: Any, out: Any, size: int) -> None:
        calls.append(size)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_copy", failing)
    paths = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    result = RUNNER.invoke(app, ["convert", *paths, "--to", "fastvideo"])
    assert result.exit_code != 0 and len(calls) == 5
    assert [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("model", [WAN, H3], ids=lambda model: model.title)
@pytest.mark.parametrize("naming", NAMINGS)
def test_every_name_has_one_place(model: Model, naming: Naming) -> None:
    names = {name: own for name, own in model.of[naming].items() if name not in model.aliases}
    assert len(set(names.values())) == len(names) == len(FACTS[model.title])
    assert all(template(name) == (name, None) for name in names)
