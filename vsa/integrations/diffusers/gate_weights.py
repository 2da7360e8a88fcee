# SPDX-License-Identifier: Apache-2.0
"""Whether a gate's parameters hold what it computes with: adapters, quantisation and offloading."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

PLAIN = (Tensor, nn.Parameter)
"""Types of parameters that are nothing but their numbers. A DTensor is made of such, too."""


def check_readable(transformer: nn.Module, path: str, gate: nn.Module) -> None:
    """Check that a gate's own weights are what it computes with, and can be read and written.

    Args:
        transformer: which the gate is in; its hooks know what lies on a disk.
        path: of the gate's block.
        gate: the module that stands where a gate is.

    Raises:
        ValueError: they are not, or cannot.
    """
    if not isinstance(gate, nn.Linear):
        raise ValueError(
            f"the gate of {path} is wrapped by a {_named(gate)}, so that its own weights are not "
            "what it computes: call transformer.fuse_lora() and unload_lora() first"
        )
    if how := why_hidden(transformer, gate):
        raise ValueError(
            f"the gate of {path} is {how}, so that its weights can be neither saved nor loaded: "
            "call gates_state_dict and load_gates before that is done to the transformer"
        )


def why_hidden(transformer: nn.Module, gate: nn.Module) -> str | None:
    """How the values of a gate's parameters are hidden, in a word or two; None where they are not.

    Args:
        transformer: which the gate is in.
        gate: the module that stands where a gate is, maybe with an adapter.
    """
    for parameter in gate.parameters():
        if type(parameter) not in PLAIN and not isinstance(parameter, DTensor):
            return f"quantised ({_named(parameter)})"
        if not parameter.is_floating_point():
            return f"quantised ({parameter.dtype})"
        if parameter.is_meta:
            return "offloaded"
        if any(parameter is other for other in _on_disk(transformer)):
            return "offloaded to a disk"
    return None


def _named(x: object) -> str:
    """The class of an object, and the package that it is from."""
    return f"{type(x).__name__} of {type(x).__module__.split('.')[0]}"


def _on_disk(transformer: nn.Module) -> Iterator[Tensor]:
    """Parameters whose values ``enable_group_offload`` of diffusers keeps in files.

    Between calls they have memory all the same, with anything in it.
    """
    for module in transformer.modules():
        registry: Any = getattr(module, "_diffusers_hook", None)
        hook = None if registry is None else registry.hooks.get("group_offloading")
        if hook is not None and hook.group.offload_to_disk_path:
            yield from hook.group.tensor_to_key
