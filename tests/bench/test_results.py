# SPDX-License-Identifier: Apache-2.0
"""bench/results_table.py and bench/draw.py, on made-up figures: no number here was measured."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import forked
import pytest
from typer.testing import CliRunner

import results_table

pytest.importorskip("matplotlib")

from matplotlib.image import imread

import coarse_select
import draw
from vsa.cli import app
from vsa.cli.bench import plot
from vsa.cli.bench.measurement import Measurement
from vsa.diagnostics import theme
from vsa.measure.provenance import HEAD, read

PNG = b"\x89PNG\r\n"


def peer(kernel: str, direction: str = "forward", **more):
    dense = kernel == "fa3"
    about = {"grid": [32, 32, 32], "heads": 12, "head_dim": 128, "direction": direction}
    kind = {"dense": dense, "pattern": None if dense else "random", "shared": 0.12}
    gpu = {"clock": 1500.0, "power": 690.0, "power_capped": 1.0}
    numbers = {"ms": 2.0, "spread": 0.01, "tflops": 400.0, "share": 0.5, "speedup": 4.0, "gpu": gpu}
    reuse = {"reuse": {"2": 1.1, "3": 1.2, "4": 1.3}, "baseline": "fa3", "rested_ms": 1.6}
    return {"kernel": kernel, **about, **kind, **numbers, **reuse, **more}


MADE_UP = dict.fromkeys(HEAD) | {"device": "a made-up GPU", "commit": "abc", "date": "2000-01-01"}
PEERS = MADE_UP | {
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
CEILINGS = MADE_UP | {
    "command": "bench/ceilings.py",
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
STAGE_ROWS = MADE_UP | {
    "command": "bench/coarse_select.py",
    "rows": [{"shape": "480p", "stage": s, "what": w, "ms": ms, **BYTES} for s, w, ms in STAGES],
}


def written(path: Path, content) -> Path:
    path.write_text(json.dumps(content))
    return path


def run(script, *arguments: object) -> subprocess.CompletedProcess[str]:
    return forked.run(script.__file__, *arguments)


# ---- tables -------------------------------------------------------------------------------------


def test_a_section_names_facts_rows_baseline_and_what_is_missing(tmp_path: Path) -> None:
    text = results_table.section(written(tmp_path / "peers.json", PEERS))
    assert "`bench/peers.py --out peers.json`: date 2000-01-01, commit abc, device a" in text
    assert "driver" not in text  # nobody knows it
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
        (STAGE_ROWS, "| 480p | means | one kernel | 1.000 |"),
    ],
)
def test_other_benchmarks_have_tables_too(tmp_path: Path, content, expected: str) -> None:
    assert expected in results_table.section(written(tmp_path / "x.json", content))


RESULTS = Path(results_table.__file__).parent / "results"


def test_every_file_of_results_says_where_it_is_from() -> None:
    files = sorted(RESULTS.glob("*.json"))
    assert len(files) > 10
    for path in files:
        found = read(path)
        assert all(found[name] for name in ("command", "date", "commit", "device")), path
        assert path.name.startswith(found["date"]) and found["complete"] and found["rows"]


def test_the_tables_in_the_repository_are_those_of_its_results() -> None:
    document = RESULTS.parent / "TABLES.md"
    sections = (results_table.section(path) for path in sorted(RESULTS.glob("*.json")))
    text = document.read_text()
    assert results_table.insert(text, "\n\n".join(sections)) == text


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("vsa bench --shape ltx-video", "vsa bench"),
        ("vsa wan", "vsa wan"),
        ("bench/routing.py --out x.json", "bench/coarse_select.py"),
        ("bench/parallel.py", "bench/parallel.py"),
    ],
)
def test_a_command_names_its_benchmark(command: str, name: str) -> None:
    assert results_table.benchmark(command) == name


def test_wan_and_check_and_parallel_have_tables(tmp_path: Path) -> None:
    run_of = {"step_ms": 528.2, "total_ms": 26440.0, "steps_ms": [528.2] * 50, "memory": 1 << 30}
    stages = {"attention": 345.8, "linear layers": 96.1, "norms": 16.7, "cross-attention": 21.9}
    one = run_of | {"stages_ms": stages}
    row = {"size": "81x480x832", "kept": 69, "tiles": 546, "dense": one, "sparse": one}
    text = section_of(tmp_path, "vsa wan --size 480p", [row])
    assert "| 81x480x832 | 69 of 546 | dense | 528.2 | 345.8 | 96.1 |" in text
    assert "50 in 26.44 | 1.00 | 1.00 |" in text
    row = {"shape": "ltx-2", "head_dim": 64, "dtype": "bfloat16", "backend": "torch"}
    row |= {"multiples": {"out": 1.25}, "failed": ["out"]}
    text = section_of(tmp_path, "vsa check --shape ltx-2", [row])
    assert "| ltx-2 | 64 | bfloat16 | torch | 1.25 | failed: out |" in text
    row = {"shape": "tiny", "case": "even", "mode": "eager", "what": "forward", "spread": 0.01}
    one = row | {"ranks": 1, "ms": 3.0, "per_rank_ms": [3.0], "way": "", "sent": 0}
    two = one | {"ranks": 2, "ms": 2.0, "per_rank_ms": [1.9, 2.0], "way": "2 groups"}
    part = two | {"mode": "part", "what": "heads to sequence", "sent": 4e6}
    text = section_of(tmp_path, "bench/parallel.py", [one, two, part])
    assert "| tiny | even | eager | forward | 2 | 2 groups | 2.000 ±1.0% | 1.50 |" in text
    assert "| tiny | 2 | heads to sequence | 2.000 ±1.0% | 1.900, 2.000 | 2 |" in text


def section_of(folder: Path, command: str, rows: list) -> str:
    content = MADE_UP | {"command": command, "rows": rows}
    return results_table.section(written(folder / "x.json", content))


def test_tables_in_a_document_are_replaced_and_the_rest_stays(tmp_path: Path) -> None:
    document = tmp_path / "RESULTS.md"
    document.write_text("# Results\n\nBy hand.\n")
    peers = written(tmp_path / "peers.json", PEERS)
    assert run(results_table, peers, "--into", document).returncode == 0
    document.write_text(document.read_text() + "\nAfter.\n")
    other = written(tmp_path / "stages.json", STAGE_ROWS)
    assert run(results_table, other, "--into", document).returncode == 0
    text = document.read_text()
    assert text.startswith("# Results\n\nBy hand.\n") and text.endswith("\nAfter.\n")
    assert "one kernel" in text and "FlashAttention" not in text
    assert text.count(results_table.BEGIN) == text.count(results_table.END) == 1


def test_files_of_no_benchmark_are_refused(tmp_path: Path) -> None:
    done = run(results_table, written(tmp_path / "x.json", {"rows": [{"a": 1}]}))
    assert done.returncode == 2 and "lacks command, date, commit" in " ".join(done.stderr.split())
    done = run(results_table, written(tmp_path / "x.json", MADE_UP | {"command": "ls", "rows": []}))
    assert done.returncode == 2 and "but it is 'ls'" in done.stderr
    with pytest.raises(ValueError, match="end of tables"):
        results_table.insert(results_table.BEGIN, "tables")


# ---- pictures -----------------------------------------------------------------------------------


def test_the_ceilings_are_the_fastest_product_and_the_smallest_footprint() -> None:
    assert draw.ceilings(CEILINGS["rows"]) == (800.0, {64: 9.0, 128: 9.0})
    with pytest.raises(ValueError, match="groups wgmma and loads"):
        draw.ceilings(CEILINGS["rows"][1:])


def test_blocks_are_drawn_as_large_as_they_are() -> None:
    kernel = (Path(__file__).parents[2] / "csrc" / "kernels" / "fine" / "forward.h").read_text()
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
    assert draw.parts(STAGE_ROWS["rows"]) == parts


def test_videos_are_named_as_the_layers_that_they_are() -> None:
    for name, (extent, heads, head_dim) in coarse_select.SHAPES.items():
        title = draw.MODELS[name]
        assert f"{'x'.join(map(str, extent))} tokens, {heads} heads of {head_dim}" in title


@pytest.mark.parametrize("name", ["layers", "length", "density"])
def test_pictures_of_vsa_bench_are_drawn_again_from_their_rows(tmp_path: Path, name: str) -> None:
    rows, picture = RESULTS / f"2026-11-25-h200-{name}.json", tmp_path / "again.png"
    done = CliRunner().invoke(app, ["bench", "--read", str(rows), "--plot", str(picture)])
    assert done.exit_code == 0, done.output
    kept = RESULTS.parent / "pictures" / f"{name}.png"
    assert imread(picture).shape == imread(kept).shape  # drawn by the same command


def test_bars_of_layers_say_which_head_dim_they_have() -> None:
    found = read(RESULTS / "2026-11-25-h200-layers.json")["rows"]
    rows = [Measurement.of_row(row) for row in found]
    cases = list(dict.fromkeys((row.shape, row.kept, row.tiles) for row in rows))
    names = dict(zip([shape for shape, *_ in cases], plot._names(rows, cases), strict=True))
    assert names["wan-1.3b-480p"] == "wan-1.3b-480p: 12 heads of 128\n78 of 624 tiles"
    assert names["ltx-video"].startswith("ltx-video: 32 heads of 64\n")
    alone = [row for row in rows if row.shape == "ltx-video"]
    assert plot._names(alone, cases[-1:]) == ["ltx-video\n18 of 144 tiles"]


def test_kernels_of_others_have_the_colour_of_no_stage() -> None:
    ours, *others = draw.COLOURS.values()
    assert ours == theme.BLUE
    assert not {*others} & {*theme.STAGES, *theme.DIRECTIONS.values(), theme.PALE, theme.MUTED}


def test_pictures_are_written(tmp_path: Path) -> None:
    peers, ceilings, rows = (
        written(tmp_path / f"{name}.json", content)
        for name, content in (("peers", PEERS), ("ceilings", CEILINGS), ("rows", STAGE_ROWS))
    )
    roofline, stages = tmp_path / "roofline.png", tmp_path / "stages.png"
    given = "--ceilings", ceilings, "--peers", peers, "--out", roofline
    assert run(draw, "roofline", *given).returncode == 0
    assert run(draw, "stages", "--rows", rows, "--out", stages).returncode == 0
    assert roofline.read_bytes().startswith(PNG) and stages.read_bytes().startswith(PNG)
    done = run(draw, "roofline", "--ceilings", rows, "--peers", peers, "--out", roofline)
    assert done.returncode == 2 and "groups wgmma and loads" in done.stderr
    other = written(tmp_path / "other.json", CEILINGS | {"device": "another GPU"})
    done = run(draw, "roofline", "--ceilings", other, "--peers", peers, "--out", roofline)
    assert done.returncode == 2 and "a made-up GPU and another GPU" in " ".join(done.stderr.split())


def test_host_parts_have_tables(tmp_path: Path) -> None:
    fine = "void vsa::launch::persistent_kernel<vsa::FineForward<vsa::Config<vsa::Bf16, 64> > >()"
    row = {"layer": "LTX", "what": "gates", "both, host us": 757.6, "node, host us": 200.4}
    kernels = {fine: 131.42, "vsa::launch::(anonymous namespace)::axis_kernel(vsa::X)": 5.6}
    text = section_of(tmp_path, "bench/host_parts.py", [row | {"kernels": kernels}])
    assert "| LTX | gates | 758 | 200 |" in text
    assert "| layer | attention | fine forward, us | axis, us |" in text
    assert "| LTX | gates | 131.4 | 5.6 |" in text


def test_training_steps_have_a_column_for_graphs(tmp_path: Path) -> None:
    row = {"build": "this", "model": "8 x 512", "what": "sparse", "step ms": 28.107}
    text = section_of(tmp_path, "bench/host.py", [row | {"step graph ms": 21.069}])
    assert "| 8 x 512 | sparse | this | 28.1 | 21.1 |" in text


def test_plain_tables_have_a_column_for_each_key(tmp_path: Path) -> None:
    rows = [
        {"direction": "forward", "masked ms": 1.48297, "kernels": {"a": 1}, "launches": 3},
        {"direction": "forward+backward", "masked ms": 5.168, "launches": 4},
        {"time": 0.1, "dense": 0.25},
    ]
    text = section_of(tmp_path, "bench/masks.py", rows)
    assert "| direction | masked ms | launches |" in text and "kernels" not in text
    assert "| forward | 1.483 | 3 |" in text and "| forward+backward | 5.168 | 4 |" in text
    assert text.index("| time | dense |") > text.index("forward+backward")
    assert "| 0.1 | 0.25 |" in text
