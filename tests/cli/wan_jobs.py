# SPDX-License-Identifier: Apache-2.0
"""What the processes of test_wan_ranks.py do."""

from __future__ import annotations

import json
from pathlib import Path

import torch.distributed as dist
from typer.testing import CliRunner

from vsa.cli import app

RUNNER = CliRunner(env={"COLUMNS": "160", "TERM": "dumb"})
SMALL = ["wan", "--tiny", "--device", "cpu", "--size", "5x64x96", "--steps", "2"]


def two(rank: int) -> None:
    """Dense and sparse with every tile are the same video; the first rank alone prints."""
    holder = [None]
    if rank == 0:
        import tempfile

        holder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(holder, 0)
    file = Path(str(holder[0])) / "wan.json"
    more = ["--topk", "1", "--ranks", "2", "--guidance", "2", "--dense-layers", "0"]
    result = RUNNER.invoke(app, [*SMALL, *more, "--json", str(file)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert ("self-attention" in result.output) == (rank == 0)
    if rank == 0:
        written = json.loads(file.read_text())
        assert written["ranks"] == 2
        (row,) = written["rows"]
        assert 0 < row["difference"] < 1  # one layer kept one tile
    result = RUNNER.invoke(app, [*SMALL, "--topk", "1.0"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    if rank == 0:
        share = float(result.output.split("differ by ")[1].split("%")[0])
        assert share == 0 and "2 x " in result.output
    for arguments, words in (
        (["--ranks", "3"], "there are 2 processes, but 3 were asked for"),
        (["--size", "9x48x80"], "2 processes cannot share out 45 tokens evenly"),
        (["--report", "wan.html"], "a report is of whole sequences"),
    ):
        result = RUNNER.invoke(app, [*SMALL, *arguments])
        assert result.exit_code == 2 and words in " ".join(result.output.split()), result.output
