# SPDX-License-Identifier: Apache-2.0
"""What happens around every forward pass of a sparse transformer: the grid, the step, the work."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from vsa.diagnostics.record import Record
from vsa.integrations.diffusers.compiled import UNTRACED, check_exported
from vsa.integrations.diffusers.coordinates import Layout
from vsa.integrations.diffusers.families import Family
from vsa.integrations.diffusers.parallel import sharding_group
from vsa.integrations.diffusers.passes import BoundCheckpoint, OfThread, Passes, recomputing
from vsa.integrations.diffusers.processors import REFRESH, SparseProcessor, heads_in
from vsa.integrations.diffusers.sharding import Sharding
from vsa.integrations.diffusers.steps import MOST_CALLS, Steps
from vsa.integrations.diffusers.work import Store, Work
from vsa.schedule import StepSchedule
from vsa.stages.inputs import Tile
from vsa.values.budget import LayerBudget, TopK, check, resolve
from vsa.values.budgets import Budgets
from vsa.values.grid import Extent, Grid, best_tile
from vsa.values.masks import ChunkCausal, Rule, tile_under
from vsa.values.precision import LayerPrecision, in_layer
from vsa.values.score import Score
from vsa.values.sequence import Segment, Sequence

Schedule = Callable[[int, int], TopK | Budgets | None]
"""topk(layer, step) -> as in ``vsa.attention``, budgets of all layers, or None for dense."""

PLAN = "_vsa_plan"
"""The attribute of a transformer that holds its plan."""
CHECKPOINT = "_gradient_checkpointing_func"
"""The attribute in which diffusers holds its checkpointing function."""

_tile_for = lru_cache(maxsize=64)(best_tile)


@dataclass(frozen=True)
class Settings:
    """The arguments of ``apply_vsa``, checked."""

    topk: TopK | Budgets | Schedule
    tile: Tile
    dense_steps: int
    refresh_every: int
    gates: str | None = None
    score: Score = "mean"
    tail: bool = False
    precision: LayerPrecision = "native"
    mask: Rule | None = None

    @property
    def need_steps(self) -> bool:
        """Whether the denoising step makes a difference."""
        by_step = callable(self.topk) or callable(self.precision)
        return by_step or self.dense_steps > 0 or self.refresh_every > 1

    def __str__(self) -> str:
        topk: object = self.topk
        if isinstance(topk, (Budgets, StepSchedule)):
            topk = repr(topk)
        elif callable(topk):
            topk = getattr(topk, "__name__", "function")
        words = [f"topk={topk}"]
        words.append(f"tile={self.tile}")
        words.append(f"gates={self.gates}")
        words += [f"score={self.score}"] if self.score != "mean" else []
        words += [f"dense_steps={self.dense_steps}"] if self.dense_steps else []
        words += [f"refresh_every={self.refresh_every}"] if self.refresh_every > 1 else []
        words += ["tail=True"] if self.tail else []
        words += [f"mask={self.mask}"] if self.mask is not None else []
        words += [f"precision={_in_words(self.precision)}"] if self.precision != "native" else []
        return ", ".join(words)


def _in_words(precision: LayerPrecision) -> str:
    """A name, how many layers have each, or a function's name."""
    if callable(precision):
        return getattr(precision, "__name__", "function")
    if isinstance(precision, str):
        return precision
    return ", ".join(f"{precision.count(name)} x {name}" for name in dict.fromkeys(precision))


class Stores(OfThread):
    """Selections of a generation, in each thread others: a few for every layer."""

    def __init__(self) -> None:
        self._generation = 0
        self._stores: dict[tuple[int, int], Store] = {}

    def of(self, layer: int, steps: Steps) -> Store | None:
        """Where a layer's selections are kept in this call of this generation.

        Calls beyond what guidance needs keep none, so that loops of constant timesteps do not keep
        more and more of them. A transformer that joins a generation late (the second of a pair)
        finds none of the one before.
        """
        if self._generation != steps.generation:
            self._generation = steps.generation
            self._stores.clear()
        if steps.call >= MOST_CALLS:
            return None
        return self._stores.setdefault((layer, steps.call), Store())


class _Pass(OfThread):
    """The pass that runs in this thread: the works that it took the place of, innermost last."""

    def __init__(self) -> None:
        self.outer: list[dict[int, Work | None]] = []


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
        steps: of the generation, which several transformers may share.
        stores: selections that are taken again.
        passes: recent ones, for recomputation.
        running: what runs in this thread.
        record: what is filled in while the transformer runs, by ``collect``.
    """

    family: Family
    settings: Settings
    layers: dict[str, nn.Module]
    processors: dict[int, SparseProcessor]
    dense_layers: frozenset[int] = frozenset()
    sharding: Sharding | None = None
    steps: Steps = field(default_factory=Steps)
    stores: Stores = field(default_factory=Stores)
    passes: Passes = field(default_factory=Passes)
    running: _Pass = field(default_factory=_Pass)
    record: Record | None = None
    handles: list[RemovableHandle] = field(default_factory=list)

    def install(self, transformer: nn.Module) -> None:
        """Put the processors and hooks in place."""
        attentions: list[Any] = list(self.layers.values())
        for layer, processor in self.processors.items():
            attentions[layer].processor = processor
            # print(transformer) shows modules, not their processors.
            attentions[layer].extra_repr = partial(repr, processor)
        self.handles = [
            transformer.register_forward_pre_hook(_before, with_kwargs=True),
            transformer.register_forward_hook(_after, always_call=True),
        ]
        if self.sharding is not None:
            first = getattr(transformer, self.family.blocks[0])[0]
            self.handles += self.sharding.install(transformer, first)
        setattr(transformer, PLAN, self)

    def remove(self, transformer: nn.Module) -> None:
        """Put diffusers' processors back, with the settings that ours were given meanwhile."""
        attentions: list[Any] = list(self.layers.values())
        for layer, processor in self.processors.items():
            if attentions[layer].processor is processor:
                processor.hand_settings_on()
                attentions[layer].processor = processor.original
            vars(attentions[layer]).pop("extra_repr", None)
        for handle in self.handles:
            handle.remove()
        checkpoint = getattr(transformer, CHECKPOINT, None)
        if isinstance(checkpoint, BoundCheckpoint):
            setattr(transformer, CHECKPOINT, checkpoint.original)
        if getattr(transformer, PLAN, None) is self:  # not where installing it has failed
            delattr(transformer, PLAN)

    def before(self, transformer: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Give every layer its work, before the transformer runs."""
        names = _parameters(transformer)
        call = {**dict(zip(names, args, strict=False)), **kwargs}
        group = self._check_processors()
        layout = self.family.layout(transformer.config, call)
        if self.sharding is not None:
            self.sharding.tokens = math.prod(layout.shape)
        again = not torch.compiler.is_compiling() and recomputing()
        if again and self.settings.need_steps:
            if self.settings.refresh_every > 1:
                raise RuntimeError(REFRESH.format(what="activation checkpointing"))
            works = self.passes.of(call["hidden_states"])
        else:
            works = self._new_works(call, layout, group, again)
        self._begin(transformer, works)

    def _new_works(
        self, call: Mapping[str, Any], layout: Layout, group: Any, again: bool
    ) -> dict[int, Work]:
        recorded = self.record is not None and not again
        check_exported(self.settings, self.record is not None)
        if self.settings.need_steps or recorded:
            self.steps.advance(call, self.family.rising)
        # The first call of a step is noted; what guidance adds would take its place.
        noted = recorded and not self.steps.call and self.record.begin(self.steps.step)  # type: ignore[union-attr]
        works = {layer: self._work(layer, layout, group, noted) for layer in self.processors}
        for layer, work in works.items():
            if work.note is None:
                self.processors[layer].remembered.add(work)
        if self.settings.need_steps:
            self.passes.add(call["hidden_states"], works)
        return works

    def _begin(self, transformer: Any, works: Mapping[int, Work]) -> None:
        if torch.is_grad_enabled() and getattr(transformer, "gradient_checkpointing", False):
            if self.settings.refresh_every > 1:
                raise ValueError(REFRESH.format(what="gradient checkpointing"))
            checkpoint = getattr(transformer, CHECKPOINT)
            if not isinstance(checkpoint, BoundCheckpoint):
                setattr(transformer, CHECKPOINT, BoundCheckpoint(checkpoint, sparse_layers))
        self.running.outer.append(
            {layer: processor.work for layer, processor in self.processors.items()}
        )
        self._set(works)

    def after(self, transformer: Any) -> None:
        """Take back what only this pass needed, also when it failed."""
        if self.running.outer:  # the pass may have failed before it began
            self._set(self.running.outer.pop())

    def _work(self, layer: int, layout: Layout, group: Any = None, noted: bool = False) -> Work:
        settings, step = self.settings, max(self.steps.step, 0)
        shape, before, after, own, segments, ungated = layout
        if settings.gates is not None and ungated is not None:
            raise NotImplementedError(ungated)
        if group is not None and before + after:
            raise NotImplementedError(
                f"{before + after} other tokens stand beside the video, which cannot be "
                "told from it where the sequence is sharded: run it on one device"
            )
        mask = _common_mask(settings.mask, own)
        tile = settings.tile
        if tile == "auto":
            tile = tile_under(mask, shape) or _tile_for(shape)
        dense = step < settings.dense_steps or layer in self.dense_layers
        topk = None if dense else self._topk(layer, step, Grid(shape, tile))
        store, reuse = None, False
        if settings.refresh_every > 1 and topk is not None:
            store = self.stores.of(layer, self.steps)
            reuse = (step - settings.dense_steps) % settings.refresh_every != 0
            if store is not None and not reuse:
                # A cache of diffusers may skip this layer now: no later step is to take what an
                # earlier one than this chose.
                store.selection = None
        note = partial(self.record.note, layer, step) if self.record and noted else None
        if note is not None and mask is not None:
            raise NotImplementedError(
                f"collect cannot look at a transformer under a mask, which is {mask}: it would "
                "count tiles that may not be chosen"
            )
        return Work(
            shape,
            tile,
            topk,
            store,
            reuse,
            group,
            self.sharding,
            note,
            before,
            after,
            settings.score,
            settings.tail,
            "native" if topk is None else in_layer(settings.precision, layer, step),
            mask,
            self.sharding is not None or settings.mask is not None,
            None if settings.gates is None or segments is None else _packed(segments, shape, tile),
        )

    def _topk(self, layer: int, step: int, grid: Grid) -> TopK | None:
        """The budget of a layer in a step, checked; None for dense attention."""
        path, attn = list(self.layers.items())[layer]
        topk = self.settings.topk
        found = topk(layer, step) if callable(topk) else topk
        if isinstance(found, Budgets):
            found.check_grid(grid)
            found = found.of(path)
        if isinstance(found, LayerBudget):
            resolve(found, grid.num_tiles, heads_in(attn))
        elif found is not None:
            check(found, heads_in(attn))
        return found

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
                name = type(attn.processor).__name__
                raise RuntimeError(
                    f"the attention processor of {path} has been replaced by a {name} since "
                    f"apply_vsa: {way_back(name, 'call apply_vsa again')}, or "
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


@lru_cache(maxsize=64)  # compiled code knows a sequence by its identity
def _packed(segments: tuple[int, ...], shape: Extent, tile: Extent) -> Sequence:
    """Segments that are kept and have coarse tiles, and then the video."""
    before = [Segment(tokens, coarse=True) for tokens in segments]
    return Sequence([*before, Segment(shape, tile)])


def _common_mask(mask: Rule | None, own: ChunkCausal | None) -> Rule | None:
    """The mask that was asked for, inside of the model's own."""
    if mask is None or own is None:
        return mask or own
    if not isinstance(mask, ChunkCausal) or mask.frames != own.frames:
        raise ValueError(
            f"mask must be None or a ChunkCausal of {own.frames} frames, since this transformer's "
            f"own mask is causal over blocks of so many, but it is {mask}"
        )
    return mask


def way_back(processor: str, otherwise: str) -> str:
    """How to be rid of a processor of this name, which stands where ours cannot."""
    if processor.startswith("Fused"):
        return "call transformer.unfuse_qkv_projections(), which sparse attention has no use for"
    return otherwise


def sparse_layers(block: Any) -> list[SparseProcessor]:
    """The sparse processors inside of a block, or of what is called for one."""
    if not isinstance(block, nn.Module):
        return []
    found = (getattr(module, "processor", None) for module in block.modules())
    return [processor for processor in found if isinstance(processor, SparseProcessor)]


@torch.compiler.disable(reason=UNTRACED)
def _before(transformer: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
    # A function, not a method: a copy of the transformer must find the copy of its plan.
    getattr(transformer, PLAN).before(transformer, args, kwargs)


@torch.compiler.disable(reason=UNTRACED)
def _after(transformer: Any, args: Any, output: Any) -> None:
    getattr(transformer, PLAN).after(transformer)


def _parameters(transformer: Any) -> tuple[str, ...]:
    """The names of forward's parameters; the class knows them whatever has wrapped the object."""
    return tuple(inspect.signature(type(transformer).forward).parameters)[1:]
