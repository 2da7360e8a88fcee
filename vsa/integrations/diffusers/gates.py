# SPDX-License-Identifier: Apache-2.0
"""Coarse gates under FastVideo's names: ``blocks.N.to_gate_compress.weight`` and ``.bias``.

A gate is linear in the layer's normed input, element-wise and without activation, and weighs the
coarse branch: out = coarse * gate + fine. diffusers drops these weights when it loads a checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vsa.integrations.diffusers.plan import PLAN, Plan

NAME = "to_gate_compress"
_KEY = re.compile(rf"(?:.*?\.)??((?:\w+_)?blocks\.\d+)\.(?:attn1?\.)?{NAME}\.(.+)")


def create_gates(layers: Mapping[str, nn.Module]) -> dict[nn.Module, nn.Linear]:
    """A gate that is zero, so that it changes nothing yet, for every layer without one.

    Returns:
        By layer, which has not got it yet.

    Raises:
        ValueError: weights that are stored in a type in which nothing can be computed, and that
            do not say in which they are.
    """
    made = {}
    for path, attn in layers.items():
        if hasattr(attn, NAME):
            continue
        to_q: Any = attn.to_q
        gate = nn.Linear(
            to_q.in_features,
            to_q.out_features,
            device=to_q.weight.device,
            dtype=_compute_dtype(path, attn),
        )
        nn.init.zeros_(gate.weight)
        nn.init.zeros_(gate.bias)
        made[attn] = gate
    return made


def _compute_dtype(path: str, attn: Any) -> torch.dtype:
    """What a layer computes in, which its weights may not be stored in.

    Quantised weights are whole numbers or 8-bit floats; norms and biases beside them are not. A
    cast layer by layer (``enable_layerwise_casting``) leaves a hook that knows.
    """
    registry = getattr(attn.to_q, "_diffusers_hook", None)
    for hook in () if registry is None else registry.hooks.values():
        if isinstance(getattr(hook, "compute_dtype", None), torch.dtype):
            return hook.compute_dtype
    for tensor in (attn.to_q.weight, *attn.parameters()):
        if tensor.is_floating_point() and tensor.element_size() > 1:
            return tensor.dtype
    raise ValueError(
        f"gates cannot be made for {path}, whose weights are stored in "
        f"{attn.to_q.weight.dtype} with nothing beside them that says in which type it computes: "
        "call apply_vsa before the weights are quantised"
    )


def delete_gates(layers: Mapping[str, nn.Module]) -> None:
    """Take the gates out."""
    for attn in layers.values():
        if hasattr(attn, NAME):
            delattr(attn, NAME)


def gates_state_dict(transformer: nn.Module) -> dict[str, Tensor]:
    """The gates under FastVideo's names.

    Args:
        transformer: one on which ``apply_vsa(..., gates="coarse")`` has been called.

    Returns:
        ``blocks.N.to_gate_compress.weight`` (dim, dim) and ``.bias`` (dim,) of every layer.

    Raises:
        ValueError: a transformer without gates.
    """
    return {
        f"{path}.{NAME}.{name}": value
        for path, gate in _gates(transformer).items()
        for name, value in gate.state_dict().items()
    }


def load_gates(transformer: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load the gates of a FastVideo checkpoint.

    Args:
        transformer: one on which ``apply_vsa(..., gates="coarse")`` has been called.
        state_dict: the whole checkpoint or its gates; other weights are passed over. Both
            ``blocks.N.to_gate_compress`` and ``blocks.N.attn1.to_gate_compress`` are understood,
            under any prefix.

    Raises:
        ValueError: a transformer without gates, or gates that are missing, left over or of another
            shape; nothing has been loaded then.
    """
    gates = _gates(transformer)
    found = gates_in(state_dict)
    wanted = gates_state_dict(transformer)
    for kind, names in (
        ("lacks", wanted.keys() - found.keys()),
        ("has no layer for", found.keys() - wanted.keys()),
    ):
        if names:
            subject = "state_dict" if kind == "lacks" else "the transformer"
            raise ValueError(
                f"{subject} {kind} {_some(names)}: load a checkpoint whose gates are those of "
                f"the {len(gates)} layers of this transformer"
            )
    for name, value in wanted.items():
        if found[name].shape != value.shape:
            raise ValueError(
                f"state_dict holds {name} as {tuple(found[name].shape)}, but this transformer's is "
                f"{tuple(value.shape)}"
            )
    for path, gate in gates.items():
        gate.load_state_dict({name: found[f"{path}.{NAME}.{name}"] for name in gate.state_dict()})


def gates_in(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gates among the weights of a checkpoint, by ``blocks.N.to_gate_compress.*``."""
    return {
        f"{match[1]}.{NAME}.{match[2]}": value
        for key, value in state_dict.items()
        if (match := _KEY.fullmatch(key))
    }


def is_gate(key: str) -> bool:
    """Whether a checkpoint's weight of this name belongs to a gate."""
    return _KEY.fullmatch(key) is not None


def _gates(transformer: nn.Module) -> dict[str, nn.Module]:
    plan: Plan | None = getattr(getattr(transformer, "_orig_mod", transformer), PLAN, None)
    gates = {path: getattr(attn, NAME, None) for path, attn in plan.layers.items()} if plan else {}
    if None in gates.values() or not gates:
        raise ValueError(
            "transformer has no coarse gates: call apply_vsa(transformer, topk=..., "
            'gates="coarse") first'
        )
    for path, gate in gates.items():
        if not isinstance(gate, nn.Linear):
            kind, package = type(gate).__name__, type(gate).__module__.split(".")[0]
            raise ValueError(
                f"the gate of {path} is wrapped by a {kind} of {package}, so that its own weights "
                "are not what it computes: call transformer.fuse_lora() and unload_lora() first"
            )
    return gates  # type: ignore[return-value]


def _some(names: set[str]) -> str:
    first = sorted(names)
    return ", ".join(first[:2]) + (f" and {len(first) - 2} more" if len(first) > 2 else "")
