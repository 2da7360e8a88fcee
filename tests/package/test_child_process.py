# SPDX-License-Identifier: Apache-2.0
"""tests/child_process.py: what hangs is ended, what is slow is not."""

from __future__ import annotations

import subprocess
import sys

import child_process
import pytest


@pytest.mark.parametrize(
    ("code", "limit"),
    [
        ("while True: pass", {"most": 1.0}),
        (
            "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'while 1: 1'])",
            {"most": 1},
        ),
        ("import time\ntime.sleep(3600)", {"idle": 1.0}),
    ],
    ids=["busy", "child of its own", "asleep"],
)
def test_what_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, code: str, limit: dict) -> None:
    monkeypatch.setattr(child_process, "EACH", 0.1)
    with pytest.raises(TimeoutError, match="was ended after"):
        child_process.run([sys.executable, "-S", "-c", code], **limit)


def test_what_ends_says_what_it_printed() -> None:
    done = child_process.run([sys.executable, "-c", "import sys; print(1); sys.exit('no')"])
    assert isinstance(done, subprocess.CompletedProcess)
    assert (done.returncode, done.stdout, done.stderr) == (1, "1\n", "no\n")
