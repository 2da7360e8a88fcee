#!/usr/bin/env bash
# PyTorch 2.13.0. A model that torch.export exports, with an operator of torch.library.custom_op that
# takes a list: run as exported, an empty list is an empty list. In a package of AOTInductor the
# operator is handed None in its place, against its own schema, and a list with something in it as it
# is.
# Seen: [1, 2] and [] as exported; [1, 2] and None in the package.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy setuptools
"$folder/env/bin/python" - "$folder" <<'PYTHON'
import sys

import torch
from torch import Tensor

seen = []
library = torch.library.Library("finding", "FRAGMENT")
library.define("add(Tensor x, int[] numbers) -> Tensor")


def add(x: Tensor, numbers) -> Tensor:
    seen.append(numbers if numbers is None else list(numbers))
    return x + sum(numbers or [])


library.impl("add", add, "CompositeExplicitAutograd")
torch.library.register_fake("finding::add", lambda x, numbers: torch.empty_like(x), lib=library)


class Model(torch.nn.Module):
    def __init__(self, numbers):
        super().__init__()
        self.numbers = numbers

    def forward(self, x):
        return torch.ops.finding.add(x, self.numbers)


x = torch.ones(3)
for numbers in ([1, 2], []):
    program = torch.export.export(Model(numbers), (x,))
    program.module()(x)
    path = f"{sys.argv[1]}/{len(numbers)}.pt2"
    package = torch._inductor.aoti_compile_and_package(program, package_path=path)
    torch._inductor.aoti_load_package(package)(x)
    print(f"{numbers}: as exported {seen[-2]}, in a package {seen[-1]}")
assert seen == [[1, 2], [1, 2], [], None], "it has changed"
PYTHON
