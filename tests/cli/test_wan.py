# SPDX-License-Identifier: Apache-2.0
"""``vsa wan``: the models it builds, the loop it times, what it prints and refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("diffusers")
from diffusers import WanTransformer3DModel
from torch.nn import functional

from vsa.cli import app
from vsa.cli.wan.attention import preferring
from vsa.cli.wan.compare import compare
from vsa.cli.wan.loop import Denoiser, run
from vsa.cli.wan.model import CONFIGURATIONS, SIZES, Size, loaded_model, random_model
from vsa.cli.wan.parts import ATTENTION, CROSS, LINEAR, NORMS, PARTS, in_ranges
from vsa.integrations.diffusers import apply_vsa
from vsa.measure.provenance import HEAD
from vsa.measure.shapes import SHAPES

RUNNER = CliRunner(env={"COLUMNS": "160", "TERM": "dumb"})
SMALL = ["wan", "--tiny", "--device", "cpu", "--size", "9x64x96", "--steps", "2"]
CPU = torch.device("cpu")


def invoke(*more: str) -> Any:
    return RUNNER.invoke(app, [*SMALL, *more])


def tiny(dtype: torch.dtype = torch.float32) -> WanTransformer3DModel:
    return random_model("tiny", None, CPU, dtype)


def denoiser(model: Any, steps: int = 3, guidance: float | None = None) -> Denoiser:
    passes = 1 if guidance is None else 2
    noise, text = torch.randn(1, 16, 3, 8, 12), torch.randn(passes, 6, 32)
    return Denoiser(model, noise, text, steps, guidance)


def test_both_runs_are_timed_and_written(tmp_path: Path) -> None:
    file = tmp_path / "wan.json"
    result = invoke("--topk", "1.0", "--json", str(file), "--size", "5x64x64")
    assert result.exit_code == 0, result.output
    for words in ("self-attention", "end to end", "peak memory", "backend torch", "random"):
        assert words in result.output
    written = json.loads(file.read_text())
    assert list(written)[: len(HEAD)] == list(HEAD) and written["diffusers"]
    assert written["random_weights"] and written["torch"] == torch.__version__
    assert [each["size"] for each in written["rows"]] == ["9x64x96", "5x64x64"]
    for each in written["rows"]:
        assert each["difference"] < 1e-4  # every tile was kept
        for one in (each["dense"], each["sparse"]):
            assert len(one["steps_ms"]) == 2 and one["memory"] > 0
            assert sum(one["steps_ms"]) <= one["total_ms"] * 1.01
            parts = [one["stages_ms"][part] for part in (ATTENTION, *PARTS)]
            assert all(part > 0 for part in parts) and sum(parts) < one["stages_ms"]["step"]
        assert (
            set(each["sparse"]["stages_ms"]) > {"fine"} and "fine" not in each["dense"]["stages_ms"]
        )


def test_settings_reach_the_transformer_and_guidance_doubles_the_passes() -> None:
    more = ["--guidance", "5", "--dense-layers", "0,-1", "--tile", "2,4,4"]
    result = invoke(*more)
    assert result.exit_code == 0, result.output
    assert "differ by 0.0%" in result.output  # both layers stay dense
    result = invoke(*more[:2], "--topk", "1", "--dense-steps", "1", "--refresh-every", "2")
    assert result.exit_code == 0 and "differ by 0.0%" not in result.output


def test_low_precision_stands_beside_native(tmp_path: Path) -> None:
    file = tmp_path / "wan.json"
    result = invoke("--precision", "int8", "--json", str(file))
    assert result.exit_code == 0, result.output
    for words in ("sparse, native", "low precision", "x native", "bfloat16"):
        assert words in result.output
    written = json.loads(file.read_text())
    (row,) = written["rows"]
    assert written["precision"] == "int8"
    assert len(row["native"]["steps_ms"]) == len(row["sparse"]["steps_ms"]) == 2
    assert 0 < row["difference_to_native"] < 0.05
    result = invoke("--precision", "native,fp8", "--json", str(file))
    assert result.exit_code == 0, result.output
    assert json.loads(file.read_text())["precision"] == ["native", "fp8"]
    result = invoke("--precision", "native,native", "--json", str(file))
    (row,) = json.loads(file.read_text())["rows"]
    assert row["native"] is None and row["difference_to_native"] is None


@pytest.mark.parametrize(
    ("precision", "sentence"),
    [
        ("int4", 'precision must be "native", "int8" or "fp8", but it is \'int4\''),
        ("int8,int8,fp8", "precision must have one name for each of the 2 layers, but it has 3"),
    ],
)
def test_precisions_that_are_none_are_refused(precision: str, sentence: str) -> None:
    result = invoke("--precision", precision)
    words = " ".join(result.output.replace("│", " ").split())
    assert result.exit_code == 2 and sentence in words


def test_a_report_is_written_of_the_first_video(tmp_path: Path) -> None:
    page = tmp_path / "wan.html"
    result = invoke("--report", str(page), "--size", "5x64x64", "--guidance", "2")
    assert result.exit_code == 0, result.output
    assert "kept, by layer and step" in result.output and page.name in result.output
    text = page.read_text()
    assert "3x4x6 tokens" in text and "2 layers" in text and "2 steps noted" in text


def test_guidance_leads_away_from_the_second_text() -> None:
    model = tiny()
    guided = denoiser(model, guidance=3.0)
    time = torch.tensor(500)
    one, other = (
        Denoiser(model, guided.noise, text[None], 3).flow(guided.noise, time)
        for text in guided.text
    )
    expected = other + 3.0 * (one - other)
    torch.testing.assert_close(guided.flow(guided.noise, time), expected)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "80x64x64"], "frames must be 4 n + 1"),
        (["--size", "9x60x64"], "height must be a multiple of 16"),
        (["--size", "large"], "480p"),
        (["--dense-steps", "2"], "leave none to be sparse"),
        (["--dense-layers", "0,9"], "from -2 to 1"),
        (["--dense-layers", "first"], "whole numbers such as"),
        (["--weights", "."], "leave --tiny"),
        (["--json", "wan.txt"], ".json"),
        (["--report", "wan.txt"], ".html"),
        (["--report", "/nowhere/at/all.png"], "folder that exists"),
        (["--topk", "0"], "topk"),
        (["--text", __file__], "holds no tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[:1]),
)
def test_bad_options_are_named_before_the_run(arguments: list[str], words: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert words in " ".join(result.output.replace("│", " ").split())


def test_a_cpu_is_refused_for_the_real_model() -> None:
    result = RUNNER.invoke(app, ["wan", "--device", "cpu"])
    assert result.exit_code == 2 and "add --tiny" in result.output


def test_help_fills_the_terminal_whatever_the_lines_of_the_source() -> None:
    result = RUNNER.invoke(app, ["wan", "--help"])
    assert "with random weights unless --weights gives real ones" in result.output


def test_without_diffusers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vsa.cli.extras.find_spec", lambda name: None)
    result = invoke()
    assert result.exit_code == 1
    assert "pip install '.[diffusers]' in a clone" in result.output


def test_text_is_checked_and_used(tmp_path: Path) -> None:
    file = tmp_path / "text.pt"
    torch.save(torch.randn(1, 7, 32), file)
    assert invoke("--text", str(file)).exit_code == 0
    result = invoke("--text", str(file), "--guidance", "5")
    assert result.exit_code == 2 and "(2, tokens, 32)" in result.output


def test_weights_come_from_a_folder_of_diffusers(
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match="has neither"):
        loaded_model(tmp_path, CPU, torch.float32)
    model = tiny()
    model.save_pretrained(tmp_path / "transformer")
    loaded, gates = loaded_model(tmp_path, CPU, torch.bfloat16)
    assert not gates
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value.float(), model.state_dict()[name], rtol=1e-2, atol=1e-2)
    assert {name: p.dtype for name, p in loaded.named_parameters()} == {
        name: p.dtype for name, p in tiny(torch.bfloat16).named_parameters()
    }
    real = ["--weights", str(tmp_path), "--device", "cpu", *SMALL[-4:]]
    result = RUNNER.invoke(app, ["wan", *real])
    assert result.exit_code == 0 and "random" not in result.output, result.output

    model.save_pretrained(tmp_path, max_shard_size="100KB")
    (tmp_path / "transformer").rename(tmp_path / "elsewhere")
    sharded, _ = loaded_model(tmp_path, CPU, torch.float32)
    for name, value in sharded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])

    index = next(tmp_path.glob("*.index.json"))
    named = json.loads(index.read_text())
    lost = min(named["weight_map"].values())
    named["weight_map"] = {k: v for k, v in named["weight_map"].items() if v != lost}
    index.write_text(json.dumps(named))
    with pytest.raises(ValueError, match="weights must be complete"):
        loaded_model(tmp_path, CPU, torch.float32)
    config = tmp_path / "config.json"
    fewer = json.loads(config.read_text()) | {"num_layers": 1}
    config.write_text(json.dumps(fewer))
    with pytest.raises(ValueError, match=r"holds blocks\.1\..* has no place for"):
        loaded_model(tmp_path, CPU, torch.float32)
    index.unlink()
    with pytest.raises(ValueError, match=r"safetensors or its index"):
        loaded_model(tmp_path, CPU, torch.float32)
    config.write_text(json.dumps(fewer | {"_class_name": "MochiTransformer3DModel"}))
    with pytest.raises(ValueError, match=r"text-to-video WanTransformer3DModel, but .* Mochi"):
        loaded_model(tmp_path, CPU, torch.float32)
    result = RUNNER.invoke(app, ["wan", "--weights", str(tmp_path), "--device", "cpu"])
    assert result.exit_code == 2 and "text-to-video" in result.output


def test_configurations_are_those_of_the_published_models() -> None:
    for name, count in (("1.3b", 1.42e9), ("14b", 14.29e9)):
        with torch.device("meta"):
            model = WanTransformer3DModel(text_dim=4096, **CONFIGURATIONS[name])
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(count, rel=1e-2)
        layer = SHAPES[f"wan-{name}-480p"]
        assert (model.config.num_attention_heads, model.config.attention_head_dim) == (
            layer.heads,
            layer.head_dim,
        )
        assert layer.grid.shape == SIZES["480p"].grid == (21, 30, 52)
    assert SIZES["448p"].grid == (16, 28, 52) and Size(5, 16, 32).latents == (2, 2, 4)


def test_parts_of_a_step_are_told_apart_without_overlap() -> None:
    model, seen, open_now = tiny(), [], []

    @contextmanager
    def open_range(name: str) -> Iterator[None]:
        assert open_now in ([], ["step"])  # no part inside another
        seen.append(name)
        open_now.append(name)
        yield
        open_now.pop()

    start = denoiser(model)
    # q and k are normalised, as is what goes into attention, cross-attention and feed-forward
    block = [NORMS, *[LINEAR] * 3, *[NORMS] * 2, ATTENTION, LINEAR, NORMS, CROSS, NORMS]
    block += [LINEAR] * 2
    for _ in range(2):
        in_ranges(model, lambda: start.flow(start.noise, torch.tensor(500)), open_range)
        assert seen == ["step", *block * 2] and not open_now
        seen.clear()
        apply_vsa(model, topk=1, dense_layers=[0])
    start.flow(start.noise, torch.tensor(500))
    assert not seen and not any("forward" in vars(module) for module in model.modules())
    assert not any(block.attn1._forward_hooks for block in model.blocks)


def test_a_forward_that_others_replaced_is_put_back() -> None:
    model = tiny()
    layer = model.blocks[0].ffn.net[2]
    replaced = layer.forward
    layer.forward = replaced
    start = denoiser(model)
    with pytest.raises(ZeroDivisionError):
        in_ranges(model, lambda: 1 / 0, lambda name: nullcontext())
    in_ranges(model, lambda: start.flow(start.noise, torch.tensor(5)), lambda name: nullcontext())
    assert vars(layer)["forward"] is replaced


def test_compiled_blocks_are_compiled_again_after_the_ranges() -> None:
    torch._dynamo.reset()
    model = tiny()
    model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    calls = [block._compiled_call_impl for block in model.blocks]
    done = run(denoiser(model), 1, lambda: None)
    assert [block._compiled_call_impl for block in model.blocks] == calls and all(calls)
    assert len(done.steps) == 3 and done.stages["attention"] > 0


def test_any_number_of_sizes_is_compiled() -> None:
    model = tiny()
    model.compile_repeated_blocks(backend="aot_eager", fullgraph=True, dynamic=False)
    settings = {"topk": 0.5, "tile": "auto", "dense_steps": 0, "refresh_every": 1}
    with torch._dynamo.config.patch(recompile_limit=2):  # dense and sparse of one size
        for frames in (5, 9):
            size = Size(frames, 32, 64)
            start = Denoiser(model, torch.randn(1, 16, *size.latents), torch.randn(1, 6, 32), 1)
            compare(start, size, settings, {}, lambda _: None)


def test_a_preferred_kernel_is_the_one_that_runs() -> None:
    x = torch.randn(1, 2, 8, 16)
    with preferring({"FlashAttention": 0.1}):
        priority = torch._C._get_sdp_priority_order()
        functional.scaled_dot_product_attention(x, x, x)
    assert priority[0] == int(torch.nn.attention.SDPBackend.FLASH_ATTENTION.value)
    with preferring({}):
        assert torch._C._get_sdp_priority_order() != priority
