#!/usr/bin/env bash
# PyTorch 2.13.0. ctx.saved_tensors looks like an attribute, and a backward may read it as often as
# it likes: but not under torch.utils.checkpoint with use_reentrant=False, the recommended form,
# where the second reading raises. With use_reentrant=True, and without checkpointing, it works. So
# an autograd.Function that passes every test of its own can break in a checkpointed model.
# Seen: plain and reentrant give gradients, the other CheckpointError "Unpack is being triggered for
# a tensor that was already unpacked once".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/env/bin/python" - <<'PYTHON'
import torch
from torch.utils.checkpoint import CheckpointError, checkpoint


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0]
        y = ctx.saved_tensors[1]
        return gradient * y, gradient * x


def gradients(call):
    x, y = (torch.tensor([2.0, 3.0], requires_grad=True) for _ in range(2))
    call(x, y).sum().backward()
    return x.grad.tolist(), y.grad.tolist()


def checkpointed(reentrant):
    return lambda x, y: checkpoint(Product.apply, x, y, use_reentrant=reentrant)


for call in (Product.apply, checkpointed(True)):
    assert gradients(call) == ([2.0, 3.0], [2.0, 3.0]), "it has changed"
print(torch.__version__, "plain and reentrant: gradients")
try:
    gradients(checkpointed(False))
except CheckpointError as error:
    print(str(error)[:120])
    assert "already unpacked once" in str(error), "it has changed"
else:
    raise SystemExit("it has changed: no error")
PYTHON
