# SPDX-License-Identifier: Apache-2.0
"""Scripts and ranks that tests start, forked from one process that has warmed up (warm.py).

A new interpreter takes seconds of CPU time to import PyTorch and to trace a first function, which
is most of what a small run of a benchmark takes. What a test says of a new interpreter itself needs
one: child_process.py.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from child_process import Limits


def context() -> ForkServerContext:
    """Of multiprocessing; its server starts with the first process, and warms up once."""
    forkserver.set_forkserver_preload(["warm"])
    # Where the server finds that module: it is not told before Python 3.14.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")


def _work(script: str, arguments: list[str], env: dict[str, str], said: list[Path]) -> None:
    """In the process: what `python script arguments` does, with what it prints in two files."""
    os.setsid()
    for stream, file in enumerate(said, start=1):
        os.dup2(os.open(file, os.O_WRONLY), stream)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


def run(
    script: Path | str, *arguments: object, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a Python script to its end, with what it prints, as child_process.run would.

    Raises:
        TimeoutError: if it takes more CPU time than a test's program may (child_process.py).
    """
    words = [str(word) for word in (script, *arguments)]
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder, name) for name in ("out", "err")]
        for file in said:
            file.touch()
        given = dict(os.environ if env is None else env)
        process = context().Process(target=_work, args=(words[0], words[1:], given, said))
        process.start()
        assert process.pid is not None
        limits = Limits(process.pid, words[0])
        try:
            while process.join(limits.look) or process.exitcode is None:
                limits.check()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        out, err = (file.read_text() for file in said)
        return subprocess.CompletedProcess(words, process.exitcode, out, err)
