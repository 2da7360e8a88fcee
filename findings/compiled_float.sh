#!/usr/bin/env bash
# PyTorch 2.13.0. Under torch.compile a Python float that changes between calls becomes data where it
# multiplies a tensor: 2 graphs for any number of values. Where it is an argument of an operator
# (one made by torch.library.custom_op) it is a constant again, one graph for every value, and the
# ninth is an error with fullgraph=True. The same for a float attribute of a module; an int attribute
# of a module is a constant in both. Seen: product 2 graphs for 6 values, argument 7 (one in vain).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0
"$folder/env/bin/python" - <<'PYTHON'
import torch
from torch._dynamo.testing import CompileCounterWithBackend


@torch.library.custom_op("findings::scaled", mutates_args=())
def scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    return x * factor


@scaled.register_fake
def _(x, factor):
    return torch.empty_like(x)


def graphs(call):
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for level in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4):
        assert torch.allclose(compiled(torch.ones(2), level), torch.ones(2) * level)
    return counter.frame_count


product = graphs(lambda x, level: x * (torch.ones(()) * level))
argument = graphs(scaled)
print(f"torch {torch.__version__}: product {product} graphs, argument {argument}, for 6 values")
assert (product, argument) == (2, 7), "the behaviour has changed"
PYTHON
