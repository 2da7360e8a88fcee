#!/usr/bin/env bash
# PyTorch 2.13.0. One call of a compiled function inside a dispatch mode, FlopCounterMode for
# instance, ends its compilation for good: that call and all later ones, outside of any mode and
# with code that had already been made and used, run in eager mode, without a word. (With
# fullgraph=True they are errors.) So counting the operations of a compiled model, once, makes it
# an eager model for the rest of the process: count on the function before it is compiled.
# Seen: compiled code called 1 time before the mode, 0 times inside it and 0 times in two calls
# after it; 524288 operations counted.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/env/bin/python" - <<'PYTHON'
import torch
from torch.utils.flop_counter import FlopCounterMode

weight, x = torch.randn(2, 64, 64).unbind()
ran = 0


def product(x):
    return (x @ weight).relu()


def backend(graph, _):
    def call(*inputs):
        global ran
        ran += 1
        return graph(*inputs)

    return call


def calls(times):
    before = ran
    for _ in range(times):
        compiled(x)
    return ran - before


compiled = torch.compile(product, backend=backend)
before = calls(1)
with FlopCounterMode(display=False) as counter:
    inside = calls(1)
after = calls(2)
print(torch.__version__, "compiled code ran", before, inside, after, "times")
print(counter.get_total_flops(), "operations")
assert (before, inside, after) == (1, 0, 0), "the behaviour has changed"
assert counter.get_total_flops() == 2 * 64**3, "the behaviour has changed"
PYTHON
