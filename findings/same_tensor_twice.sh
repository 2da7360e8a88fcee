#!/usr/bin/env bash
# PyTorch 2.13.0. torch.compile cannot trace an autograd.Function that is given one tensor twice, as
# self-attention of a tensor is: Function.apply(x, x, x). With fullgraph=True it is an error; without
# it the graph breaks before and after, in every layer, without a word. Of a view
# of the same tensor it knows nothing: apply(x, x.view_as(x)) is one graph, with the right gradient.
# Seen: 3 graphs for one tensor twice, 1 for a view; with fullgraph "duplicate tensor input".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/env/bin/python" - <<'PYTHON'
import torch
from torch._dynamo.exc import Unsupported


class Weighted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        return 2 * x + y

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient, gradient


def gradient(call):
    x = torch.ones(3, requires_grad=True)
    call(x).sum().backward()
    return x.grad.tolist()


def twice(x):
    y = 2 * x
    return 3 * Weighted.apply(y, y)


def by_view(x):
    y = 2 * x
    return 3 * Weighted.apply(y, y.view_as(y))


def graphs(call):
    made = []

    def keep(graph, _):
        made.append(graph)
        return graph

    assert gradient(torch.compile(call, backend=keep)) == [18.0] * 3, "it has changed"
    return len(made)


counts = graphs(twice), graphs(by_view)
print(torch.__version__, "eager", gradient(twice), "graphs: twice, by a view", counts)
assert gradient(twice) == [18.0] * 3 and counts == (3, 1), "it has changed"
try:
    gradient(torch.compile(twice, backend="eager", fullgraph=True))
except Unsupported as error:
    print(str(error).splitlines()[0])
    assert "duplicate tensor input" in str(error), "it has changed"
else:
    raise SystemExit("it has changed: no error")
found = gradient(torch.compile(by_view, backend="eager", fullgraph=True))
print("a view of it:", found)
assert found == [18.0] * 3, "it has changed"
PYTHON
