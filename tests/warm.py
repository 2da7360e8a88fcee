# SPDX-License-Identifier: Apache-2.0
"""What takes a process long the first time, done by importing this before it forks (forked.py)."""

from __future__ import annotations

import gc
import importlib
import sys
from contextlib import suppress

HEAVY = ("torch.distributed.fsdp", "vsa.cli", "diffusers.models.transformers", "matplotlib.pyplot")


def warm_up() -> None:
    """Imports, and a first trace: dynamo then lists all that it knows by name, and reads sources.

    Forked processes begin with one thread each, as tests do: others do not survive a fork.
    """
    # The server starts in a folder that may be a clone, whose sources are not compiled.
    sys.path[:] = [path for path in sys.path if path]
    for name in HEAVY:
        with suppress(ImportError):
            importlib.import_module(name)
    import torch

    import vsa

    torch.set_num_threads(1)
    layer = vsa.nn.VideoSparseAttention(16, 2, topk=1)
    torch.compile(layer, backend="aot_eager")(torch.randn(1, 4, 4, 4, 16)).sum().backward()
    torch.compiler.reset()
    torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0  # as in conftest.py
    gc.collect()
    gc.freeze()  # what is imported is not walked, and so not copied, in each process
    gc.set_threshold(200_000)  # as in conftest.py


if __name__ == "__main__":
    # .ci/run starts it for the compiled files that it leaves, which PYTHONDONTWRITEBYTECODE would
    # prevent: each later process would compile all of PyTorch again, for 4 to 20 s of CPU time.
    sys.dont_write_bytecode = False
warm_up()
