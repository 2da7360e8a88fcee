#!/usr/bin/env bash
# PyTorch 2.11.0 and 2.13.0. A subclass of threading.local may give its attributes defaults as class
# attributes, and Python's own documentation does. Where a thread has set such an attribute, a function
# under torch.compile reads the class's default in 2.11, with fullgraph=True too and without a word:
# seen 0.0 where the same function uncompiled gives 3.0. 2.13 gives 3.0, and so do both where
# __init__ sets the attribute, which runs in every thread anew.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/thread.py" <<'PYTHON'
import sys
import threading

import torch


class ByClass(threading.local):
    level = 0


class ByInit(threading.local):
    def __init__(self):
        self.level = 0


def seen(kind):
    torch._dynamo.reset()
    mine = kind()
    mine.level = 3
    call = lambda x: x + mine.level
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    return call(torch.zeros(1)).item(), compiled(torch.zeros(1)).item()


by_class, by_init = seen(ByClass), seen(ByInit)
print(f"torch {torch.__version__}: (eager, compiled) by class {by_class}, by __init__ {by_init}")
assert by_class == (3.0, float(sys.argv[1])) and by_init == (3.0, 3.0), "the behaviour has changed"
PYTHON
for expected in 2.11.0:0 2.13.0:3; do
    python3 -m venv "$folder/env"
    "$folder/env/bin/pip" install --quiet "torch==${expected%:*}" numpy
    "$folder/env/bin/python" "$folder/thread.py" "${expected#*:}"
    rm -r "$folder/env"
done
