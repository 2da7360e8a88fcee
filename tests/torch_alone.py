# SPDX-License-Identifier: Apache-2.0
"""What `python -c` and `python -m` do, forked from a process that has imported PyTorch alone.

Nearly all that a new interpreter takes to import vsa goes to PyTorch. Here vsa, and what else lies
where Python is told to look first, is as new as in one. Options of the interpreter itself, such as
-S, want one that is new.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
import types
from pathlib import Path
from typing import Any

PRELOADED = ("torch._dynamo", "torch.distributed.fsdp", "typer", "rich.progress")
"""What commands of ours import, and none of it is ours."""


class Server:
    """The process that has imported PyTorch, until it is closed."""

    def __init__(self) -> None:
        environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
        pipe, command = subprocess.PIPE, [sys.executable, __file__]
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, env=environment
        )

    def run(self, site: Path, *arguments: str, cwd: Path | str) -> subprocess.CompletedProcess[str]:
        """What `python ARGUMENTS` does where PYTHONPATH is a folder, with what it prints."""
        assert arguments[0] in ("-c", "-m")
        with tempfile.TemporaryDirectory() as folder:
            said = [Path(folder, name) for name in ("out", "err")]
            for file in said:
                file.touch()
            request = {
                "arguments": arguments,
                "site": str(site),
                "cwd": str(cwd),
                "environment": {**os.environ, "PYTHONPATH": str(site), "COLUMNS": "400"},
                "said": list(map(str, said)),
            }
            print(json.dumps(request), file=self._process.stdin, flush=True)
            status = int(self._process.stdout.readline())
            out, err = (file.read_text() for file in said)
        return subprocess.CompletedProcess(arguments, status, out, err)

    def close(self) -> None:
        """Ends it."""
        self._process.communicate()


def work(
    arguments: list[str], site: str, cwd: str, environment: dict[str, str], said: list[str]
) -> None:
    """In the forked process."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream, file in enumerate(said, start=1):
        os.dup2(os.open(file, os.O_WRONLY), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    option, what, *rest = arguments
    sys.argv, sys.orig_argv = [option, *rest], [sys.executable, *arguments]
    sys.path[:] = ["" if option == "-c" else os.getcwd(), site, *sys.path[1:]]
    if option == "-c":
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), main.__dict__)
    else:
        runpy.run_module(what, run_name="__main__", alter_sys=True)


def status_of(request: dict[str, Any]) -> int:
    """Does it; what the interpreter would exit with."""
    try:
        work(**request)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def serve() -> None:
    """Forks for each line that comes, and says what the process exited with."""
    for name in PRELOADED:
        importlib.import_module(name)
    assert not any(name.startswith(("vsa", "video_sparse_attention")) for name in sys.modules)
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            status = status_of(json.loads(line))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
