# SPDX-License-Identifier: Apache-2.0
"""Coarse gates under FastVideo's names: ``blocks.N.to_gate_compress.weight`` and ``.bias``.

A gate is linear in the layer's normed input, element-wise and without activation, and weighs the
coarse branch: out = coarse * gate + fine. diffusers drops these weights when it loads a checkpoint.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vsa.integrations.diffusers.gate_files import NAME, gates_at, gates_beside, gates_in
from vsa.integrations.diffusers.gate_weights import check_readable, why_hidden
from vsa.integrations.diffusers.plan import PLAN, Plan
from vsa.integrations.diffusers.processors import query_of


class Gate(nn.Linear):
    """A linear layer that goes where its input is, as its weights may be offloaded apart."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), on the device of x and, outside of autocast, in its type."""
        weight = self.weight.to(x.device)
        bias = None if self.bias is None else self.bias.to(x.device)
        if weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
            return nn.functional.linear(x, weight, bias)
        return nn.functional.linear(x.to(weight.dtype), weight, bias).to(x.dtype)


def gates_of(layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The gates that layers have, by the path of their block."""
    return {path: getattr(attn, NAME) for path, attn in layers.items() if hasattr(attn, NAME)}


def put_gates(layers: Mapping[str, nn.Module], gates: Mapping[str, nn.Module]) -> None:
    """Give layers these gates, by the path of their block, and take all others out."""
    for path, attn in layers.items():
        if hasattr(attn, NAME):
            delattr(attn, NAME)
        if path in gates:
            attn.add_module(NAME, gates[path])


def new_gates(
    transformer: Any, layers: Mapping[str, nn.Module], bias: bool
) -> dict[str, nn.Module]:
    """A gate for every layer without one: as it lies beside the model's weights, or zero.

    Args:
        transformer: whose weights may lie in a local folder.
        layers: its attention modules by the path of their block.
        bias: whether gates of its family have one.

    Returns:
        By the path of a block, which has not got it yet.

    Raises:
        ValueError: weights that are sharded, or stored in a type in which nothing can be computed
            and that do not say in which they are; or gates beside the weights that are not these
            layers'.
    """
    made: dict[str, nn.Module] = {}
    for path, attn in layers.items():
        if hasattr(attn, NAME):
            continue
        to_q = query_of(attn)
        if isinstance(to_q.weight, DTensor):
            raise ValueError(
                f"gates cannot be made for {path}, whose weights are sharded already, so that the "
                "gradients of gates would stay apart on every rank: call apply_vsa before "
                "fully_shard"
            )
        device = to_q.weight.device
        gate = Gate(
            to_q.in_features,
            to_q.out_features,
            bias,
            # Weights that are offloaded to "meta" have no memory that ours could be beside.
            device="cpu" if device.type == "meta" else device,
            dtype=_compute_dtype(path, attn),
        )
        for parameter in gate.parameters():
            nn.init.zeros_(parameter)
        made[path] = gate
    if len(made) == len(layers) and (found := gates_beside(transformer)):
        _load(made, found)
    return made


def name_gates_beside(transformer: Any) -> None:
    """Warn of trained gates in the folder of a model that is to run without any."""
    try:
        if not any(x.any() for x in gates_beside(transformer).values()):
            return
        said = 'trained gates lie beside the weights and are left out: pass gates="coarse"'
    except ValueError as error:
        said = f"whether trained gates lie beside the weights is not known, since {error}"
    folder = transformer.config._name_or_path
    warnings.warn(f"gates is None for the transformer of {folder}, but {said}", stacklevel=4)


def check_untrained(transformer: nn.Module, gates: Mapping[str, nn.Module]) -> None:
    """Refuse to let go of gates that hold anything.

    Args:
        transformer: that they are in.
        gates: by the path of their block.

    Raises:
        ValueError: so they do, or their weights cannot be read.
    """
    for path, gate in gates.items():
        if hidden := why_hidden(transformer, gate):
            which = f"gate that may be trained, as it is {hidden} and cannot be read, and"
        elif any(x.detach().float().any() for x in gate.parameters()):
            which = "trained gate,"
        else:
            continue
        raise ValueError(
            f"gates is None, but {path} has a {which} which would be lost: pass "
            'gates="coarse" to keep it, or call remove_vsa(transformer) first to delete it'
        )


def _compute_dtype(path: str, attn: Any) -> torch.dtype:
    """What a layer computes in, which its weights may not be stored in.

    Quantised weights are whole numbers or 8-bit floats; norms and biases beside them are not. A
    cast layer by layer (``enable_layerwise_casting``) leaves a hook that knows.
    """
    projection = query_of(attn)
    to_q = getattr(projection, "base_layer", projection)  # of an adapter
    registry = getattr(to_q, "_diffusers_hook", None)
    hooks = () if registry is None else registry.hooks.values()
    for each in (*hooks, to_q):  # bitsandbytes and GGUF say it in the layer itself
        if isinstance(getattr(each, "compute_dtype", None), torch.dtype):
            return each.compute_dtype
    for tensor in (projection.weight, *attn.parameters()):
        if tensor.is_floating_point() and tensor.element_size() > 1:
            return tensor.dtype
    raise ValueError(
        f"gates cannot be made for {path}, whose weights are stored in "
        f"{projection.weight.dtype} with nothing beside them that says in which type it computes: "
        "call apply_vsa before the weights are quantised"
    )


def gates_state_dict(transformer: nn.Module) -> dict[str, Tensor]:
    """The gates under FastVideo's names.

    Args:
        transformer: one on which ``apply_vsa(..., gates="coarse")`` has been called.

    Returns:
        ``blocks.N.to_gate_compress.weight`` (dim, dim) and ``.bias`` (dim,) of every layer.

    Raises:
        ValueError: a transformer without gates, or gates whose weights cannot be read, since they
            are offloaded, quantised or under an adapter.
    """
    return {
        f"{path}.{NAME}.{name}": value
        for path, gate in _gates(transformer).items()
        for name, value in gate.state_dict().items()
    }


def load_gates(
    transformer: nn.Module, state_dict: Mapping[str, Tensor] | str | os.PathLike[str]
) -> None:
    """Load the gates of a FastVideo checkpoint, or of a transformer that was saved with its own.

    Args:
        transformer: one on which ``apply_vsa(..., gates="coarse")`` has been called.
        state_dict: the whole checkpoint or its gates; other weights are passed over. Both
            ``blocks.N.to_gate_compress`` and ``blocks.N.attn1.to_gate_compress`` are understood,
            under any prefix. Or the path of a safetensors file, or of a folder of them.

    Raises:
        ValueError: a transformer without gates, or whose gates are offloaded, quantised or under an
            adapter; a path without any, or gates that are missing, left over, of another shape or
            there twice; nothing has been loaded then.
    """
    gates = _gates(transformer)
    _load(gates, gates_at(state_dict) if isinstance(state_dict, (str, os.PathLike)) else state_dict)


def _load(gates: Mapping[str, nn.Module], state_dict: Mapping[str, Tensor]) -> None:
    found = gates_in(state_dict)
    wanted = {
        f"{path}.{NAME}.{name}": value
        for path, gate in gates.items()
        for name, value in gate.state_dict().items()
    }
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


def _gates(transformer: nn.Module) -> dict[str, nn.Module]:
    plan: Plan | None = getattr(getattr(transformer, "_orig_mod", transformer), PLAN, None)
    gates: dict[str, Any] = {}
    if plan:
        gates = {path: getattr(attn, NAME, None) for path, attn in plan.layers.items()}
    if None in gates.values() or not gates:
        raise ValueError(
            "transformer has no coarse gates: call apply_vsa(transformer, topk=..., "
            'gates="coarse") first'
        )
    for path, gate in gates.items():
        check_readable(transformer, path, gate)
    return gates


def _some(names: set[str]) -> str:
    first = sorted(names)
    return ", ".join(first[:2]) + (f" and {len(first) - 2} more" if len(first) > 2 else "")
