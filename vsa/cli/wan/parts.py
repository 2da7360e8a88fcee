# SPDX-License-Identifier: Apache-2.0
"""The parts of a step of a Wan transformer, each in a range of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from diffusers.models.transformers import transformer_wan
from torch import nn

from vsa.integrations.diffusers import processors
from vsa.measure import stage_hooks

STEP = "step"
ATTENTION = "attention"
"""Self-attention proper: after projections, norms and rotation, with the exchange of its ranks."""
CROSS, LINEAR, NORMS = "cross-attention", "linear layers", "norms"
PARTS = (LINEAR, NORMS, CROSS)
"""What else is told apart, without overlap: cross-attention has its own projections and norms in
it, and what is left of a step is rotation, modulation, activations and sums."""


def in_ranges(transformer: Any, call: Callable[[], object], open_range: stage_hooks.Range) -> None:
    """Run ``call`` in the range "step", and each self-attention and each of ``PARTS`` in its own.

    Args:
        transformer: a WanTransformer3DModel, dense or sparse, whose blocks run uncompiled.
        call: what runs it.
        open_range: opens a range by name.
    """
    with ExitStack() as wrapped:
        for block in transformer.blocks:
            for module, part in _parts(block):
                wrapped.enter_context(_inside(module, part, open_range))
        wrapped.enter_context(_self_attention(transformer, open_range))
        with open_range(STEP):
            call()


def _parts(block: Any) -> Iterator[tuple[nn.Module, str]]:
    """The modules of a block that make up ``PARTS``."""
    cross = block.attn2
    yield cross, CROSS
    within_cross = set(cross.modules())
    for module in block.modules():
        if module in within_cross:
            continue
        if isinstance(module, nn.Linear):
            yield module, LINEAR
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            yield module, NORMS


@contextmanager
def _inside(module: nn.Module, part: str, open_range: stage_hooks.Range) -> Iterator[None]:
    """Run a module's forward in a range, until it ends."""
    forward = module.forward
    own = "forward" in vars(module)

    def forward_in_range(*args: Any, **kwargs: Any) -> Any:
        with open_range(part):
            return forward(*args, **kwargs)

    module.forward = forward_in_range
    try:
        yield
    finally:
        if own:
            module.forward = forward
        else:
            del module.forward


@contextmanager
def _self_attention(transformer: Any, open_range: stage_hooks.Range) -> Iterator[None]:
    """Run self-attention proper in its range, until it ends."""
    inside = [False]

    def enter(*_: object) -> None:
        inside[0] = True

    def leave(*_: object) -> None:
        inside[0] = False

    def ranged(function: Callable[..., Any]) -> Callable[..., Any]:
        def call_in_range(*args: Any, **kwargs: Any) -> Any:
            if not inside[0]:  # cross-attention goes through the same function
                return function(*args, **kwargs)
            with open_range(ATTENTION):
                return function(*args, **kwargs)

        return call_in_range

    handles = []
    for block in transformer.blocks:
        layer: nn.Module = block.attn1
        handles += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    dense = transformer_wan.dispatch_attention_fn
    sparse, sharded = processors.attention, processors.ulysses_attention
    transformer_wan.dispatch_attention_fn = ranged(dense)
    processors.attention, processors.ulysses_attention = ranged(sparse), ranged(sharded)
    try:
        yield
    finally:
        transformer_wan.dispatch_attention_fn = dense
        processors.attention, processors.ulysses_attention = sparse, sharded
        for handle in handles:
            handle.remove()
