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


class Limits:
    """Ends the processes of a session that take more than they may.

    Args:
        session: its first process.
        name: of the program, for the error.
        most: CPU seconds that they may take.
        idle: seconds by the clock in which they may take none.
    """

    def __init__(self, session: int, name: str, most: float = MOST, idle: float = IDLE) -> None:
        self._session, self._name, self._most, self._idle = session, name, most, idle
        self._taken, self._since = 0.0, time.monotonic()
        self.look = min(EACH, idle)
        """Seconds by the clock until the next check."""

    def check(self) -> None:
        """Raises TimeoutError where they have taken too much, or nothing for too long."""
        before, self._taken = self._taken, max(self._taken, cpu_seconds(self._session))
        if self._taken > before:
            self._since = time.monotonic()
        waited = time.monotonic() - self._since
        if self._taken > self._most or waited > self._idle:
            raise TimeoutError(
                f"{self._name} was ended after {self._taken:.0f} s of CPU time, of which it took "
                f"none in the last {waited:.0f} s"
            )


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
    limits = Limits(process.pid, words[0], most, idle)
    with process:
        try:
            while True:
                try:
                    out, err = process.communicate(timeout=limits.look)
                    return subprocess.CompletedProcess(words, process.returncode, out, err)
                except subprocess.TimeoutExpired:
                    limits.check()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def output(*command: object) -> str:
    """What a program prints; fails unless it succeeds."""
    done = run(command)
    assert done.returncode == 0, f"{command[0]} failed:\n{done.stdout}{done.stderr}"
    return done.stdout.strip()
