# SPDX-License-Identifier: Apache-2.0
"""How much of Python torch.compile follows to trace a call: its steps, and how many frames.

usage: python bench/traced_steps.py [CASE ...] [--top N] [--seconds]

A step is one instruction of Python that dynamo executes symbolically, a frame one function that it
goes into. Both are the same in every run of one PyTorch and one Python, and tell more than the time
of a busy machine. --top names the functions with the most steps; --seconds adds the least CPU
seconds of three compilations, with nothing behind dynamo. Runs on a CPU.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.symbolic_convert import InstructionTranslatorBase

import vsa

Call = Callable[[], Any]


def tensors(count: int) -> list[Tensor]:
    """Of a video of eight tiles, (1, 4, 8, 16, 2, 64)."""
    return [torch.randn(1, 4, 8, 16, 2, 64, requires_grad=True) for _ in range(count)]


def plain() -> Call:
    """Attention over a video."""
    q, k, v = tensors(3)
    return lambda: vsa.attention(q, k, v, 3)


def gates() -> Call:
    """Attention with text that is masked, both gates and the log-sum-exp."""
    grid = vsa.Grid((4, 4, 5), prefix=3, suffix=2)
    q, k, v, coarse, fine = torch.randn(5, 2, grid.length, 2, 64).requires_grad_().unbind()
    valid = torch.tensor([[True, False, True, True, True]] * 2)
    options = {"gate_coarse": coarse, "gate_fine": fine, "return_lse": True}
    return lambda: vsa.attention(q, k, v, 2, grid=grid, text_valid=valid, **options)


def mask() -> Call:
    """Attention under a mask."""
    q, k, v = tensors(3)
    return lambda: vsa.attention(q, k, v, 2, mask=vsa.masks.ChunkCausal(4))


def layer() -> Call:
    """A layer with its projections."""
    made = vsa.nn.VideoSparseAttention(64, 2, topk=3, gates="both")
    x = torch.randn(2, 5, 6, 7, 64)
    return lambda: made(x)


def drop_in() -> Call:
    """FastVideo's operator, on padded tiles."""
    q, k, v = torch.randn(3, 1, 2, 192, 64).unbind()
    sizes = torch.tensor([64, 1, 40], dtype=torch.int32)
    return lambda: vsa.video_sparse_attn(q, k, v, sizes, sizes, 2, (4, 4, 4))


CASES = {each.__name__: each for each in (plain, gates, mask, layer, drop_in)}


def compiled(case: str) -> None:
    """Traces a case anew, as one graph."""
    torch.compiler.reset()
    torch.compile(CASES[case](), backend="eager", fullgraph=True)()


def traced(case: str) -> tuple[Counter[CodeType], Counter[CodeType]]:
    """Steps and frames of each function, once all that is kept between traces is there."""
    compiled(case)
    steps: Counter[CodeType] = Counter()
    frames: Counter[CodeType] = Counter()
    step = InstructionTranslatorBase.step

    def counted(self: Any) -> Any:
        steps[self.f_code] += 1
        frames[self.f_code] += self.instruction_pointer == 0
        return step(self)

    InstructionTranslatorBase.step = counted
    try:
        compiled(case)
    finally:
        InstructionTranslatorBase.step = step
    return steps, frames


def seconds(case: str) -> float:
    """CPU seconds of a compilation."""
    begin = time.process_time()
    compiled(case)
    return time.process_time() - begin


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=[*CASES], metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--top", type=int, default=0, metavar="N")
    parser.add_argument("--seconds", action="store_true")
    given = parser.parse_args()
    if unknown := set(given.cases) - set(CASES):
        parser.error(f"CASE must be one of {', '.join(CASES)}, but it is {unknown.pop()}")
    torch.set_num_threads(1)
    for case in given.cases:
        steps, frames = traced(case)
        line = f"{case}: {steps.total()} steps in {frames.total()} frames"
        if given.seconds:
            line += f", {min(seconds(case) for _ in range(3)):.2f} CPU s"
        print(line, flush=True)
        for code, count in steps.most_common(given.top):
            name = f"{code.co_filename}:{code.co_firstlineno} {code.co_qualname}"
            print(f"  {count} in {frames[code]} frames: {name}")


if __name__ == "__main__":
    main()
