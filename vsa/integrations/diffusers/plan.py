# SPDX-License-Identifier: Apache-2.0
"""What happens around every forward pass of a sparse transformer: the grid, the step, the work."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vsa.budget import TopK, resolve
from vsa.grid import Extent, best_tile
from vsa.inputs import Tile
from vsa.integrations.diffusers.families import Family
from vsa.integrations.diffusers.parallel import sharding_group
from vsa.integrations.diffusers.processors import SparseProcessor
from vsa.integrations.diffusers.sharding import Sharding
from vsa.integrations.diffusers.work import Store, Work
from vsa.record import Record

Schedule = Callable[[int, int], TopK | None]
"""topk(layer, step) -> as in ``vsa.attention``, or None for dense attention."""

PLAN = "_vsa_plan"
"""The attribute of a transformer that holds its plan."""

_tile_for = lru_cache(maxsize=64)(best_tile)


@dataclass(frozen=True)
class Settings:
    """The arguments of ``apply_vsa``, checked."""

    topk: TopK | Schedule
    tile: Tile
    dense_steps: int
    refresh_every: int

    @property
    def need_steps(self) -> bool:
        """Whether the denoising step makes a difference."""
        return callable(self.topk) or self.dense_steps > 0 or self.refresh_every > 1


@dataclass
class Steps:
    """Counts denoising steps by the timestep, which only falls within one generation."""

    step: int = -1
    call: int = 0
    timestep: float = float("-inf")

    def advance(self, timestep: object) -> None:
        """Take note of one forward pass: another step, another call of it, or a new generation."""
        now = float(timestep.max() if isinstance(timestep, Tensor) else timestep)  # type: ignore[arg-type]
        if now == self.timestep:  # guidance calls the transformer several times per step
            self.call += 1
            return
        self.step = 0 if now > self.timestep else self.step + 1
        self.call, self.timestep = 0, now


@dataclass(eq=False)
class Plan:
    """Everything that ``apply_vsa`` has put into a transformer, so that it can be taken out.

    Attributes:
        family: what kind of transformer it is.
        settings: what was asked for.
        layers: all self-attention modules by the path of their block.
        processors: ours by layer number; dense layers have none, unless the video is sharded.
        dense_layers: those that stay dense.
        sharding: of the video by hooks of ours, if any.
        record: what is filled in while the transformer runs, by ``collect``.
        noted: whether this pass goes into the record.
    """

    family: Family
    settings: Settings
    layers: dict[str, nn.Module]
    processors: dict[int, SparseProcessor]
    dense_layers: frozenset[int] = frozenset()
    sharding: Sharding | None = None
    steps: Steps = field(default_factory=Steps)
    stores: dict[tuple[int, int], Store] = field(default_factory=dict)
    record: Record | None = None
    noted: bool = False
    checkpointing: Any = None
    handles: list[RemovableHandle] = field(default_factory=list)

    def install(self, transformer: nn.Module) -> None:
        """Put the processors and hooks in place."""
        attentions: list[Any] = list(self.layers.values())
        for layer, processor in self.processors.items():
            attentions[layer].processor = processor
        self.handles = [
            transformer.register_forward_pre_hook(_before, with_kwargs=True),
            transformer.register_forward_hook(_after, always_call=True),
        ]
        if self.sharding is not None:
            self.handles += self.sharding.install(transformer, self.family)
        setattr(transformer, PLAN, self)

    def remove(self, transformer: nn.Module) -> None:
        """Put diffusers' processors back, with the settings that ours were given meanwhile."""
        attentions: list[Any] = list(self.layers.values())
        for layer, processor in self.processors.items():
            if attentions[layer].processor is processor:
                processor.hand_settings_on()
                attentions[layer].processor = processor.original
        for handle in self.handles:
            handle.remove()
        delattr(transformer, PLAN)

    def before(self, transformer: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Give every layer its work, before the transformer runs."""
        names = _parameters(transformer)
        call = {**dict(zip(names, args, strict=False)), **kwargs}
        group = self._check_processors()
        shape = self.family.grid(transformer.config, call)
        if self.sharding is not None:
            self.sharding.tokens = math.prod(shape)
        if self.settings.need_steps or self.record is not None:
            self.steps.advance(call["timestep"])
        # The first call of a step is noted; what guidance adds would take its place.
        self.noted = (
            self.record is not None and not self.steps.call and self.record.begin(self.steps.step)
        )
        works = {layer: self._work(layer, shape, group) for layer in self.processors}
        self._set(works)
        if torch.is_grad_enabled() and getattr(transformer, "gradient_checkpointing", False):
            self._bind_checkpointing(transformer, works)

    def after(self, transformer: Any) -> None:
        """Take back what only this pass needed, also when it failed."""
        if self.checkpointing is not None:
            transformer._gradient_checkpointing_func = self.checkpointing
            self.checkpointing = None

    def _work(self, layer: int, shape: Extent, group: Any = None) -> Work:
        settings, step = self.settings, max(self.steps.step, 0)
        tile = _tile_for(shape) if settings.tile == "auto" else settings.tile
        topk = settings.topk(layer, step) if callable(settings.topk) else settings.topk
        if step < settings.dense_steps or layer in self.dense_layers:
            topk = None
        if topk is not None:
            resolve(topk, 1, self._heads(layer))
        note = self._note(layer, step)
        if settings.refresh_every == 1 or topk is None:
            return Work(shape, tile, topk, group=group, sharding=self.sharding, note=note)
        store = self.stores.setdefault((layer, self.steps.call), Store())
        reuse = (step - settings.dense_steps) % settings.refresh_every != 0
        return Work(shape, tile, topk, store, reuse, group, self.sharding, note)

    def _note(self, layer: int, step: int) -> Callable[..., None] | None:
        if self.record is None or not self.noted:
            return None
        return partial(self.record.note, layer, step)

    def _heads(self, layer: int) -> int:
        return list(self.layers.values())[layer].heads  # type: ignore[return-value]

    def _set(self, works: Mapping[int, Work | None]) -> None:
        for layer, work in works.items():
            self.processors[layer].work = work

    def _check_processors(self) -> Any:
        """Never dense in silence, and never wrong in silence; -> the group that shards tokens."""
        group = None if self.sharding is None else self.sharding.group
        for (path, attn), layer in zip(self.layers.items(), range(len(self.layers)), strict=True):
            processor = self.processors.get(layer)
            if processor is None:
                continue
            if attn.processor is not processor:
                raise RuntimeError(
                    f"the attention processor of {path} has been replaced by a "
                    f"{type(attn.processor).__name__} since apply_vsa: call apply_vsa again, or "
                    "remove_vsa(transformer)"
                )
            if processor._parallel_config is not None:
                group = sharding_group(path, processor)
            processor.hand_settings_on()
        if group is not None and self.record is not None:
            raise NotImplementedError(
                "collect cannot look at a transformer whose sequence is sharded, where no rank has "
                "whole queries and keys: record it on one device"
            )
        return group

    def _bind_checkpointing(self, transformer: Any, works: Mapping[int, Work]) -> None:
        """Make recomputation in the backward pass see this pass's work, whatever ran since."""
        if self.settings.refresh_every > 1:
            raise ValueError(
                f"refresh_every is {self.settings.refresh_every}, but gradient checkpointing "
                "recomputes layers later, when other selections are stored: use 1 in training"
            )
        checkpoint = self.checkpointing = transformer._gradient_checkpointing_func

        def bound(block: Callable[..., Any], *args: Any) -> Any:
            return checkpoint(partial(self._run_with, works, block), *args)

        transformer._gradient_checkpointing_func = bound

    def _run_with(self, works: Mapping[int, Work], block: Callable[..., Any], *args: Any) -> Any:
        with self._working(works):
            return block(*args)

    @contextmanager
    def _working(self, works: Mapping[int, Work]) -> Iterator[None]:
        current = {layer: processor.work for layer, processor in self.processors.items()}
        self._set(works)
        try:
            yield
        finally:
            self._set(current)


@torch.compiler.disable
def _before(transformer: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
    # A function, not a method: a copy of the transformer must find the copy of its plan.
    getattr(transformer, PLAN).before(transformer, args, kwargs)


@torch.compiler.disable
def _after(transformer: Any, args: Any, output: Any) -> None:
    getattr(transformer, PLAN).after(transformer)


def _parameters(transformer: Any) -> tuple[str, ...]:
    """The names of forward's parameters; the class knows them whatever has wrapped the object."""
    return tuple(inspect.signature(type(transformer).forward).parameters)[1:]
