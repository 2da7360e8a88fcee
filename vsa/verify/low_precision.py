# SPDX-License-Identifier: Apache-2.0
"""How close int8 and fp8 have to be: to fp64, and where they are kernels to their simulation.

The tests and ``vsa check`` hold every backend that has them to the same problems by the same rule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vsa.functional import attention
from vsa.values.precision import Precision
from vsa.values.score import SubBlocks
from vsa.values.selection import Selection
from vsa.verify import dense, parity
from vsa.verify.parity import error

OUT = {"int8": 0.048, "fp8": 0.065}
"""Relative error of the output on N(0,1) inputs, Euclidean norm."""
OUT_SHARP = {"int8": 0.048, "fp8": 0.10}
"""The same where scores are three times as large."""
LSE = {"int8": 0.02, "fp8": 0.025}
"""Root of the mean square of what log-sum-exps are off by, where scores are not larger."""
SIMULATION = {"int8": 0.03, "fp8": 0.04}
"""From the simulation: codes of weights that lie between two, and tiles in another order."""
OFFSETS = {3: 12.0, 17: -10.0, 38: 20.0, 61: -14.0}
"""Of a few channels of the keys, as models have them."""
SIMULATED_BY = "torch"


@dataclass(frozen=True)
class Case:
    """A problem in low precision.

    Attributes:
        problem: in bf16 or fp16, with a head_dim that low precision takes.
        offsets: whether a few channels of the keys are far from zero.
    """

    problem: parity.Problem
    offsets: bool = False

    @property
    def name(self) -> str:
        """Of the case."""
        return self.problem.name

    @property
    def is_sharp(self) -> bool:
        """Whether scores are larger than those of N(0,1)."""
        return self.problem.magnitude > 1

    def inputs(self) -> dict[str, Any]:
        """q, k, v and gates."""
        found = self.problem.inputs()
        if self.offsets:
            shift = torch.zeros(self.problem.head_dim)
            shift[list(OFFSETS)] = torch.tensor(list(OFFSETS.values()))
            found["k"] = (found["k"].float() + shift).to(found["k"].dtype)
        return {name: x for name, x in found.items() if not name.startswith("upstream")}


_LONG: dict[str, Any] = {"grid": (8, 8, 16), "topk": 8, "head_dim": 64, "dtype": torch.bfloat16}
CASES = [
    *(
        Case(replace(each, head_dim=64, dtype=torch.bfloat16))
        for each in parity.PROBLEMS
        if each.magnitude == 1 and each.scale is None and not each.tail
    ),
    Case(parity.Problem("longer", **_LONG)),
    Case(parity.Problem("offsets", **_LONG), offsets=True),
    Case(parity.Problem("sharp", **_LONG, magnitude=3.0)),
]
"""Problems of the other list that low precision has, and its own: longer rows of N(0,1), the same
with offsets, and with scores three times as large."""


def changed(case: Case, **changes: Any) -> Case:
    """A case whose problem is changed."""
    return replace(case, problem=replace(case.problem, **changes))


def shares(
    case: Case, precision: Precision, device: torch.device | str = "cpu", **options: Any
) -> dict[str, float]:
    """Errors as shares of what is allowed; at most 1 passes, NaN does not.

    Args:
        case: what to compute.
        precision: "int8" or "fp8".
        device: where.
        options: more of ``vsa.attention``, such as ``backend``.

    Returns:
        by name: selection, 0 where the choice is that of the native call by the same backend, which
        ``parity`` holds to the definition, and infinite elsewhere; nothing, likewise where the same
        rows attend nothing; out and lse against fp64 over these tiles; and simulation, what the
        output is from that of the simulation.
    """
    out, lse, selection = _called(case, precision, device, **options)
    *_, native = _called(case, "native", device, **options)
    right = torch.equal(selection.bitmap, native.bitmap)
    true, true_lse = exact(case, selection)
    nothing = true_lse == -torch.inf
    off = (lse - true_lse)[~nothing].square().mean().sqrt().item()
    found = {
        "selection": 0.0 if right else math.inf,
        "nothing": 0.0 if torch.equal(lse == -torch.inf, nothing) else math.inf,
        "out": error(out, true) / (OUT_SHARP if case.is_sharp else OUT)[precision],
    }
    if not case.is_sharp:
        found["lse"] = off / LSE[precision]
    if options.get("backend") != SIMULATED_BY:
        simulated, *_ = _called(case, precision, "cpu", selection, backend=SIMULATED_BY)
        found["simulation"] = error(out, simulated.double()) / SIMULATION[precision]
    return found


@lru_cache(maxsize=64)
def _inputs(case: Case) -> dict[str, Any]:
    """Drawn once for all that are compared: it takes a quarter of a comparison."""
    return case.inputs()


def _called(
    case: Case,
    precision: Precision,
    device: torch.device | str,
    selection: Selection | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Selection]:
    """Out, log-sum-exp and choice on the CPU."""
    problem, valid = case.problem, case.problem.valid()
    with torch.no_grad():
        out, chosen, lse = attention(
            **{name: x.to(device) for name, x in _inputs(case).items()},
            topk=None if selection is not None else problem.topk,
            grid=problem.query_grid,
            kv_grid=None if problem.kv_grid is None else problem.key_grid,
            selection=selection,
            score="mean" if problem.runs == 1 else SubBlocks(problem.runs),
            text_valid=None if valid is None else valid.to(device),
            precision=precision,
            return_selection=True,
            return_lse=True,
            **options,
        )
    return out.cpu(), lse.cpu(), chosen.to("cpu")


def exact(case: Case, selection: Selection) -> tuple[Tensor, Tensor]:
    """Out and log-sum-exp over given tiles in fp64, (B, S, heads, head_dim) and (B, heads, S).

    By the oracle of ``parity``.
    """
    problem = case.problem
    with torch.no_grad():
        out, _, lse = dense.attention(
            **_inputs(case),
            topk=1.0,  # is not looked at
            grid=problem.grid,
            tile=problem.tile,
            prefix=problem.prefix,
            suffix=problem.suffix,
            kv_grid=problem.kv_grid,
            scale=problem.scale,
            mask=selection.mask(),
            text_valid=problem.valid(),
        )
    return out, lse
