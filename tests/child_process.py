# SPDX-License-Identifier: Apache-2.0
"""Programs that tests start: limited in the CPU time that they take, not by the clock.

On a machine that is busy with other work a program takes longer by the clock, and is still right.
One that hangs takes CPU time without end, or none: both are ended, and the test fails.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

MOST = 1800.0
"""CPU seconds of a program and of those that it starts."""
IDLE = 600.0
"""Seconds by the clock in which they may take none."""
EACH = 5.0
"""Seconds by the clock between two looks."""


def cpu_seconds(session: int) -> float:
    """CPU time of the processes of a session that run, and of their children that ended."""
    ticks = 0
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            # What follows the name, which is in parentheses and may hold anything.
            stat = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        if int(stat[3]) == session:
            ticks += sum(map(int, stat[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def run(
    command: Sequence[object],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | str | None = None,
    most: float = MOST,
    idle: float = IDLE,
) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end, with what it prints.

    Raises:
        TimeoutError: if it takes more than ``most`` CPU seconds, or none for ``idle`` seconds.
    """
    words = [str(word) for word in command]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        words, stdout=pipe, stderr=pipe, text=True, env=env, cwd=cwd, start_new_session=True
    )
    taken, since = 0.0, time.monotonic()
    with process:
        try:
            while True:
                try:
                    out, err = process.communicate(timeout=min(EACH, idle))
                    return subprocess.CompletedProcess(words, process.returncode, out, err)
                except subprocess.TimeoutExpired:
                    before, taken = taken, max(taken, cpu_seconds(process.pid))
                if taken > before:
                    since = time.monotonic()
                waited = time.monotonic() - since
                if taken > most or waited > idle:
                    raise TimeoutError(
                        f"{words[0]} was ended after {taken:.0f} s of CPU time, of which it took "
                        f"none in the last {waited:.0f} s"
                    )
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def output(*command: object) -> str:
    """What a program prints; fails unless it succeeds."""
    done = run(command)
    assert done.returncode == 0, f"{command[0]} failed:\n{done.stdout}{done.stderr}"
    return done.stdout.strip()
