# SPDX-License-Identifier: Apache-2.0
"""bench/results_table.py and bench/draw.py, on made-up figures: no number here was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import child_process
import pytest

import results_table

pytest.importorskip("matplotlib")

from matplotlib.image import imread

import draw
import routing

PNG = b"\x89PNG\r\n"


def peer(kernel: str, direction: str = "forward", **more):
    dense = kernel == "fa3"
    about = {"grid": [32, 32, 32], "heads": 12, "head_dim": 128, "direction": direction}
    lists = {"dense": dense, "lists": None if dense else "random", "shared": 0.12}
    gpu = {"clock": 1500.0, "power": 690.0, "power_capped": 1.0}
    numbers = {"ms": 2.0, "spread": 0.01, "tflops": 400.0, "share": 0.5, "speedup": 4.0, "gpu": gpu}
    reuse = {"reuse": {"2": 1.1, "3": 1.2, "4": 1.3}, "baseline": "fa3", "rested_ms": 1.6}
    return {"kernel": kernel, **about, **lists, **numbers, **reuse, **more}


PEERS = {
    "device": "a made-up GPU",
    "commit": "abc",
    "date": "2000-01-01",
    "command": "bench/peers.py --out peers.json",
    "rows": [
        peer("vsa", "backward"),
        peer("vsa"),
        peer("fa3", ms=8.0),
        peer("tk_vsa", head_dim=64, gpu={}),
        {"kernel": "flex", "skipped": "it is not here"},
    ],
}
WGMMA = {"probe": "wgmma", "n": 64, "a": "registers", "b": "K-major", "ms": 1.0, "TFLOP/s": 800.0}
LOADS = {"probe": "loads", "by": "TMA", "users": 0, "footprint": 16.0, "ms": 1.0, "TB/s": 9.0}
CEILINGS = {
    "device": "a made-up GPU",
    "rows": [
        WGMMA,
        *({**LOADS, "d": d} for d in (64, 128)),
        {**LOADS, "d": 128, "footprint": 96.0, "TB/s": 3.0},
        {"group": "exp2", "error": "a trap"},
    ],
}
BYTES = {"moved": 2e9, "results": 1 << 20, "peak": 3 << 20}
STAGES = [("means", "PyTorch", 3.0), ("means", "one kernel", 1.0), ("scores", "cuBLAS", 0.5)]
STAGES += [("select", "kernel", 0.2), ("scores + select", "both", 0.6), ("fine", "hopper", 9.0)]
STAGES += [("scores + select + coarse", "both", 0.7), ("coarse", "SDPA", 0.3)]
STAGES += [("attention, inference", "no gate", 11.0), ("attention, backward", "no gate", 30.0)]
STAGES += [("coarse, backward", "SDPA", 0.4)]
ROUTING = {
    "device": "a made-up GPU",
    "rows": [{"shape": "480p", "stage": s, "what": w, "ms": ms, **BYTES} for s, w, ms in STAGES],
}


def written(path: Path, content) -> Path:
    path.write_text(json.dumps(content))
    return path


def run(script, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, script.__file__, *map(str, arguments)]
    return child_process.run(command)


# ---- tables -------------------------------------------------------------------------------------


def test_a_section_names_facts_rows_baseline_and_what_is_missing(tmp_path: Path) -> None:
    text = results_table.section(written(tmp_path / "peers.json", PEERS))
    assert "device a made-up GPU, commit abc, date 2000-01-01. `bench/peers.py" in text
    row = "| 128 | 32x32x32, 12 heads | random | 12% | vsa | 2.000 ±1.0% | 400 | 50% | 4.00 "
    state = "| 1500 | 690 | 1.73 | 100% | 500 |"
    assert text.count(row + state) == 2 and text.index("Forward:") < text.index("Backward:")
    assert "over FlashAttention-3 in the same run" in text
    assert "- Not measured: FlexAttention: it is not here" in text
    rule = text[text.index("| ---") :].splitlines()[0]
    assert rule.startswith("| ---: | --- | --- | ---: | --- | ---: | ---: |")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (CEILINGS, "| loads: d 64, TMA, 16 MB | 1.000 | 9.00 |"),
        (CEILINGS, "- Not measured: exp2: a trap"),
        (ROUTING, "| 480p | means | one kernel | 1.000 |"),
    ],
)
def test_other_benchmarks_have_tables_too(tmp_path: Path, content, expected: str) -> None:
    assert expected in results_table.section(written(tmp_path / "x.json", content))


def test_results_in_the_repository_can_be_read() -> None:
    folder = Path(results_table.__file__).parent / "results"
    files = sorted(folder.glob("*.json"))
    assert files
    for path in files:
        assert "| ---" in results_table.section(path)


def test_tables_in_a_document_are_replaced_and_the_rest_stays(tmp_path: Path) -> None:
    document = tmp_path / "RESULTS.md"
    document.write_text("# Results\n\nBy hand.\n")
    peers = written(tmp_path / "peers.json", PEERS)
    assert run(results_table, peers, "--into", document).returncode == 0
    document.write_text(document.read_text() + "\nAfter.\n")
    other = written(tmp_path / "routing.json", ROUTING)
    assert run(results_table, other, "--into", document).returncode == 0
    text = document.read_text()
    assert text.startswith("# Results\n\nBy hand.\n") and text.endswith("\nAfter.\n")
    assert "one kernel" in text and "FlashAttention" not in text
    assert text.count(results_table.BEGIN) == text.count(results_table.END) == 1


def test_files_of_no_benchmark_are_refused(tmp_path: Path) -> None:
    done = run(results_table, written(tmp_path / "x.json", {"rows": [{"a": 1}]}))
    assert done.returncode == 2 and "must be a benchmark's JSON" in done.stderr
    with pytest.raises(ValueError, match="end of tables"):
        results_table.insert(results_table.BEGIN, "tables")


# ---- pictures -----------------------------------------------------------------------------------


def test_the_ceilings_are_the_fastest_product_and_the_smallest_footprint() -> None:
    assert draw.ceilings(CEILINGS["rows"]) == (800.0, {64: 9.0, 128: 9.0})
    with pytest.raises(ValueError, match="groups wgmma and loads"):
        draw.ceilings(CEILINGS["rows"][1:])


def test_blocks_are_drawn_as_large_as_they_are() -> None:
    kernel = (Path(__file__).parents[2] / "csrc" / "kernels" / "fine_forward.h").read_text()
    wide, narrow = draw.CONSUMERS[128], draw.CONSUMERS[64]
    assert f"kConsumers = D == 128 ? {wide} : {narrow};" in kernel


def test_only_our_blocks_share_loads() -> None:
    assert draw.intensity(peer("vsa")) == pytest.approx(76.8)
    assert draw.intensity(peer("vsa", head_dim=64)) == pytest.approx(83.2)
    assert draw.intensity(peer("tk_vsa")) == 64
    with pytest.raises(ValueError, match="among 3 query tiles"):
        draw.intensity(peer("vsa", reuse={"2": 1.1}))


def test_parts_are_the_fastest_and_none_is_counted_twice() -> None:
    parts = {"means": 1.0, "fine": 9.0, "scores + select + coarse": 0.7}
    assert draw.parts(ROUTING["rows"]) == parts


def test_videos_are_named_as_the_layers_that_they_are() -> None:
    for name, (extent, heads, head_dim) in routing.SHAPES.items():
        title = draw.MODELS[name]
        assert f"{'x'.join(map(str, extent))} tokens, {heads} heads of {head_dim}" in title


@pytest.mark.parametrize("name", ["layers", "length", "density"])
def test_pictures_of_vsa_bench_are_drawn_again_from_their_rows(tmp_path: Path, name: str) -> None:
    rows = Path(draw.__file__).parent / "results" / f"2026-11-25-h200-{name}.json"
    picture = tmp_path / "again.png"
    draw.bench(json.loads(rows.read_text()), "cuDNN", picture)
    assert picture.read_bytes().startswith(PNG)
    kept = Path(draw.__file__).parent / "pictures" / f"{name}.png"
    assert imread(picture).shape == imread(kept).shape  # drawn by the same command
    with pytest.raises(ValueError, match="--dense must name"):
        draw.bench(json.loads(rows.read_text()), None, picture)
    with pytest.raises(ValueError, match="those of vsa bench"):
        draw.bench(PEERS, "cuDNN", picture)


def test_pictures_are_written(tmp_path: Path) -> None:
    peers, ceilings, routing = (
        written(tmp_path / f"{name}.json", content)
        for name, content in (("peers", PEERS), ("ceilings", CEILINGS), ("routing", ROUTING))
    )
    roofline, stages = tmp_path / "roofline.png", tmp_path / "stages.png"
    given = "--ceilings", ceilings, "--peers", peers, "--out", roofline
    assert run(draw, "roofline", *given).returncode == 0
    assert run(draw, "stages", "--routing", routing, "--out", stages).returncode == 0
    assert roofline.read_bytes().startswith(PNG) and stages.read_bytes().startswith(PNG)
    done = run(draw, "roofline", "--ceilings", routing, "--peers", peers, "--out", roofline)
    assert done.returncode == 2 and "groups wgmma and loads" in done.stderr
    other = written(tmp_path / "other.json", CEILINGS | {"device": "another GPU, driver 1"})
    done = run(draw, "roofline", "--ceilings", other, "--peers", peers, "--out", roofline)
    assert done.returncode == 2 and "a made-up GPU and another GPU" in " ".join(done.stderr.split())
