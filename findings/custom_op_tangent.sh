#!/usr/bin/env bash
# PyTorch 2.13.0. An operator made by torch.library.custom_op with register_autograd has a right
# gradient in reverse mode. In forward mode its tangent is zero (torch.func.jvp) or missing
# (forward_ad), without an error or a warning. Consistency and mean-flow training, which need a jvp
# through attention, then train on a wrong target. Seen: reverse 2.0, jvp 0.0, dual tangent None.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0
"$folder/env/bin/python" - <<'PYTHON'
import torch
from torch.autograd import forward_ad


@torch.library.custom_op("findings::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


twice.register_autograd(lambda ctx, grad: 2 * grad)
x = torch.ones((), requires_grad=True)
reverse = torch.autograd.grad(twice(x), x)[0].item()
with forward_ad.dual_level():
    dual = forward_ad.unpack_dual(twice(forward_ad.make_dual(torch.ones(()), torch.ones(())))).tangent
_, tangent = torch.func.jvp(twice, (torch.ones(()),), (torch.ones(()),))
print(f"torch {torch.__version__}: reverse {reverse}, jvp {tangent.item()}, dual tangent {dual}")
assert (reverse, tangent.item(), dual) == (2.0, 0.0, None), "the behaviour has changed"
PYTHON
