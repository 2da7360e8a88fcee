# SPDX-License-Identifier: Apache-2.0
"""PyTorch operators from groups of arguments: schema, autograd and autocast are derived.

Names are stable, so that checkpointing policies can name them: ``torch.ops.vsa.NAME``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, get_type_hints

import torch
from torch import Tensor

Group = type[tuple]
"""A NamedTuple of ``vsa.values.problem``."""

KINDS = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Sequence[int]: "SymInt[]",
    Sequence[float]: "float[]",
    int: "SymInt",
    float: "float",
    str: "str",
}
"""How the type of an argument is called in an operator's schema."""

_library = torch.library.Library("vsa", "FRAGMENT")


@cache
def arguments(groups: tuple[Group, ...]) -> dict[str, str]:
    """Names of all arguments in order, and how the schema calls their types."""
    found: dict[str, str] = {}
    for group in groups:
        found |= {name: KINDS[kind] for name, kind in get_type_hints(group).items()}
    return found


def regroup(groups: tuple[Group, ...], values: Sequence[Any]) -> list[Any]:
    """Arguments in a row, as the operator gets them, in their groups again."""
    found, start = [], 0
    for group in groups:
        count = len(group._fields)  # type: ignore[attr-defined]
        found.append(group(*values[start : start + count]))
        start += count
    return found


def operator(
    name: str,
    groups: tuple[Group, ...],
    returns: str,
    compute: Callable[..., Any],
    fake: Callable[..., Any],
) -> Any:
    """An operator ``vsa::name``.

    Its results must be new tensors, which PyTorch does not check here.

    Args:
        name: of the operator.
        groups: its arguments.
        returns: types of the results, in the words of a schema.
        compute: makes the results, given the groups.
        fake: makes empty results of the same shape and type, given the groups; for torch.compile.
    """
    of_schema = ", ".join(f"{kind} {name}" for name, kind in arguments(groups).items())
    # torch.library.custom_op would do the same, with checks of its own at every call: 24 against 18
    # microseconds, and 8 where there is no autograd (PyTorch 2.13, CPU, one machine, idle).
    schema = f"{name}({of_schema}) -> {returns}"
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    # Dynamo would follow an operator that runs inside of a frame it looks at, and compiled code
    # frees a tensor once its address is taken: kernels would write to freed memory.
    @torch._disable_dynamo
    def run(*values: Any) -> Any:
        return compute(*regroup(groups, values))

    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"vsa::{name}", lambda *values: fake(*regroup(groups, values)), lib=_library
    )
    return getattr(torch.ops.vsa, name)


def differentiable(
    made: Any,
    groups: tuple[Group, ...],
    backward: Any,
    of: Sequence[str],
    saved: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    hidden: slice = slice(0, 0),
) -> None:
    """Give an operator with the results out, lse, ... its backward.

    Args:
        made: the operator.
        groups: its arguments.
        backward: the operator of the gradients: it takes an ``Upstream``, what was saved, and the
            groups; it returns a gradient for each of ``of``, empty where that was None.
        of: arguments that have gradients.
        saved: those of the results that the backward gets, the first of them like out.
        hidden: which results have no gradient.
    """
    name, name_of_backward = (each.default.name() for each in (made, backward))
    kinds = arguments(groups)
    is_tensor = [kind.startswith("Tensor") for kind in kinds.values()]

    def save(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[hidden])
        tensors = [x for x, yes in zip(inputs, is_tensor, strict=True) if yes]
        ctx.numbers = [x for x, yes in zip(inputs, is_tensor, strict=True) if not yes]
        results = saved(output)
        ctx.results = len(results)
        ctx.save_for_backward(*results, *tensors)

    def differentiate(ctx, grad_out, grad_lse, *_):
        all_saved = ctx.saved_tensors  # checkpointing lets them be asked for once
        results, tensors = all_saved[: ctx.results], iter(all_saved[ctx.results :])
        numbers = iter(ctx.numbers)
        inputs = [next(tensors) if yes else next(numbers) for yes in is_tensor]
        grad_out = torch.zeros_like(results[0]) if grad_out is None else grad_out
        grads = dict(zip(of, backward(grad_out, grad_lse, *results, *inputs), strict=True))
        named = zip(kinds, inputs, strict=True)
        return tuple(None if x is None else grads.get(name) for name, x in named)

    torch.library.register_autograd(name, differentiate, setup_context=save, lib=_library)
    torch.library.register_autograd(name_of_backward, once_only, lib=_library)


def once_only(ctx: Any, *grads: Tensor) -> Any:
    """The gradient of a gradient, which does not exist.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(
        "vsa.attention has first derivatives only, but a second one is asked for: leave out "
        "create_graph=True, or use dense attention where gradients are differentiated"
    )


def cast_under_autocast(made: Any, name: str, count: int) -> None:
    """Autocast's type for the first arguments of an operator; fp64 is left alone.

    torch.library's own registration would fix one type for good, not that of the moment.

    Args:
        made: the operator.
        name: of the operator.
        count: how many tensors it begins with.
    """
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _library.impl(name, _casting(made, count, device), key)


def _casting(made: Any, count: int, device: str) -> Callable[..., Any]:
    def cast_and_call(*values: Any) -> Any:
        tensors, rest = values[:count], values[count:]
        if torch.float64 not in {x.dtype for x in tensors}:
            tensors = tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)
        with torch.autocast(device, enabled=False):
            return made(*tensors, *rest)

    return cast_and_call
