#!/usr/bin/env bash
# PyTorch 2.13.0. Inside a dispatch mode, FlopCounterMode for instance, a function of torch.compile
# runs as if it had never been compiled, without a word, also when its code has been made before:
# operations are counted, but those of eager mode, and a time taken there is that of eager mode.
# With fullgraph=True the same call is an error. So what is counted or timed under a mode says
# nothing about compiled code.
# Seen: 524288 operations with the compiled code called 0 times, 1 time outside of the mode;
# RuntimeError "torch.compile with fullgraph=True found no compiled frames".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/env/bin/python" - <<'PYTHON'
import torch
from torch.utils.flop_counter import FlopCounterMode

weight, x = torch.randn(2, 64, 64).unbind()
ran = []


def product(x):
    return (x @ weight).relu()


def backend(graph, _):
    def call(*inputs):
        ran.append(1)
        return graph(*inputs)

    return call


compiled = torch.compile(product, backend=backend)
compiled(x)
outside = len(ran)
with FlopCounterMode(display=False) as counter:
    compiled(x)
inside = len(ran) - outside
print(torch.__version__, counter.get_total_flops(), "operations; compiled code ran", outside, inside)
assert (outside, inside, counter.get_total_flops()) == (1, 0, 2 * 64**3), "it has changed"

whole = torch.compile(product, backend=backend, fullgraph=True)
whole(x)
try:
    with FlopCounterMode(display=False):
        whole(x)
except RuntimeError as error:
    print(str(error).splitlines()[0])
    assert "found no compiled frames" in str(error), "it has changed"
else:
    raise SystemExit("it has changed: no error")
PYTHON
