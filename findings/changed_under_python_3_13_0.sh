#!/usr/bin/env bash
# PyTorch 2.9.1 and 2.11.0 under Python 3.13.0. Where an object in an attribute of a module becomes one
# of another class, as diffusers' set_attn_processor does it, a compiled model goes on with the old
# one, without a word but a warning that guards "may run slower": PyTorch leaves out guards of
# dictionaries because of a fault of this Python, and those below them with it. Under Python 3.12 the
# model is compiled anew, and so from 3.13.1 on by what PyTorch's sources say, which has not been run.
# Usage: findings/changed_under_python_3_13_0.sh python3.13.0 [python3.12 ...]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/changed.py" <<'PYTHON'
import sys

import torch


class PlusOne:
    def __call__(self, x):
        return x + 1


class TimesFive:
    def __call__(self, x):
        return x * 5


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.processor = PlusOne()

    def forward(self, x):
        return self.processor(x)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Attention(), Attention()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


model, x = Model(), torch.ones(1)
compiled = torch.compile(model, backend="eager")
assert compiled(x).item() == 3
for block in model.blocks:
    block.processor = TimesFive()
found, right = compiled(x).item(), model(x).item()
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}: {found}, eagerly {right}")
assert (found == right) != (sys.version_info[:3] == (3, 13, 0)), "the behaviour has changed"
PYTHON
for python in "$@"; do
    "$python" -m venv "$folder/env"
    "$folder/env/bin/pip" install --quiet torch==2.11.0 numpy
    "$folder/env/bin/python" "$folder/changed.py"
    rm -r "$folder/env"
done
