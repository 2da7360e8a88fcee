# SPDX-License-Identifier: Apache-2.0
"""``apply_vsa`` and ``remove_vsa``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeVar, overload

from torch import nn

from vsa.distributed.shards import ranks_of
from vsa.integrations.diffusers.compiled import warn_where_changes_are_not_seen
from vsa.integrations.diffusers.families import Family, family_of
from vsa.integrations.diffusers.gates import (
    check_untrained,
    gates_of,
    name_gates_beside,
    new_gates,
    put_gates,
)
from vsa.integrations.diffusers.plan import PLAN, Plan, Schedule, Settings, way_back
from vsa.integrations.diffusers.processors import SparseProcessor, heads_in
from vsa.integrations.diffusers.sharding import Sharding
from vsa.integrations.diffusers.steps import Steps
from vsa.schedule import StepSchedule
from vsa.stages.inputs import DEFAULT_TILE, Tile
from vsa.values import checks
from vsa.values import precision as precisions
from vsa.values.budget import TopK, check
from vsa.values.budgets import Budgets
from vsa.values.grid import SLOTS
from vsa.values.masks import RULES, Rule
from vsa.values.precision import LayerPrecision
from vsa.values.score import Score, runs_of

Transformer = TypeVar("Transformer", bound=nn.Module)


@overload
def apply_vsa(
    transformer: Transformer,
    topk: TopK | Budgets | Schedule = ...,
    *,
    tile: Tile = ...,
    score: Score = ...,
    dense_layers: Sequence[int] = ...,
    dense_steps: int = ...,
    gates: Literal["coarse"] | None = ...,
    refresh_every: int = ...,
    tail: bool = ...,
    precision: LayerPrecision = ...,
    mask: Rule | None = ...,
    group: Any = ...,
) -> Transformer: ...


@overload
def apply_vsa(
    transformer: Sequence[Transformer],
    topk: TopK | Budgets | Schedule = ...,
    *,
    tile: Tile = ...,
    score: Score = ...,
    dense_layers: Sequence[int] = ...,
    dense_steps: int = ...,
    gates: Literal["coarse"] | None = ...,
    refresh_every: int = ...,
    tail: bool = ...,
    precision: LayerPrecision = ...,
    mask: Rule | None = ...,
    group: Any = ...,
) -> list[Transformer]: ...


def apply_vsa(
    transformer: Any,
    topk: TopK | Budgets | Schedule = 0.1,
    *,
    tile: Tile = "auto",
    score: Score = "mean",
    dense_layers: Sequence[int] = (),
    dense_steps: int = 0,
    gates: Literal["coarse"] | None = None,
    refresh_every: int = 1,
    tail: bool = False,
    precision: LayerPrecision = "native",
    mask: Rule | None = None,
    group: Any = None,
) -> Any:
    """Make the self-attention of a diffusers video transformer sparse, in place.

    Only self-attention of video tokens changes: cross-attention stays, and in joint attention all
    text tokens are attended and attend everything. The grid is read from the transformer's input at
    every call. A second call replaces the settings of the first and keeps gates that are wanted
    again; without ``gates`` it is refused where they are trained.

    Denoising steps are counted by the ``timestep`` argument, in each thread for itself: a smaller
    one is the next step, the same one another call of this step (guidance), a larger one a new
    generation (for Mochi and MiniMax-H3, whose timesteps rise, a larger one is next). Timesteps
    that were rounded to the same 16 bits or whole number are told apart by what else is given.
    Reading it costs one synchronisation per call, a second one where timesteps are equal, and is
    done only where steps make a difference. Where timesteps do not tell, a warning says so: say the
    step with ``denoising_step`` or ``count_steps``.

    Args:
        transformer: ``pipe.transformer`` of Wan 2.1 and 2.2, Wan VACE and Animate, ChronoEdit,
            SkyReels-V2, LTX, LTX-2, MiniMax-H3, HunyuanVideo, HunyuanVideo 1.5, Framepack,
            CogVideoX, ConsisID, EasyAnimate, Mochi, Cosmos, Kandinsky 5 or 6, or AnyFlow; or
            several that share the steps of one generation, as
            ``[pipe.transformer, pipe.transformer_2]`` of Wan 2.2 A14B.
        topk: as in ``vsa.attention``: a number or share of tiles, one for each head, or a
            ``vsa.TopP``; or ``vsa.Budgets`` of all layers; or a function topk(layer, step) that
            returns one of these, or None for dense attention, such as a ``vsa.StepSchedule``.
        tile: tokens per tile along (t, h, w); "auto" wastes the fewest slots, and is (4, 4, 4) with
            gates, as they were trained with it.
        score: what tiles are chosen by, as in ``vsa.attention``.
        dense_layers: layers that keep diffusers' own attention, negative ones from the end.
        dense_steps: denoising steps at the beginning that do so.
        gates: "coarse" adds a coarse branch behind gates: those that the transformer has, else
            those in the local folder that it was loaded from, else zero until trained or loaded.
        refresh_every: tiles are chosen every so many steps and taken again in between; a layer
            that a cache of diffusers leaves out then chooses when it runs next.
        tail: as in ``vsa.attention``: tiles that are not chosen enter the softmax by their means.
        precision: as in ``vsa.attention``, for inference; or a list with one for each layer, such
            as ``vsa.diagnostics.PrecisionErrors.choose`` makes; or a function precision(layer,
            step) that returns one. What is dense computes as diffusers does.
        mask: which tiles may be chosen, a rule of ``vsa.masks``, for models that were trained under
            it; dense layers and steps then run as sparse ones that keep everything. A model that
            masks later frames itself (SkyReels-V2 with ``num_frame_per_block``) needs none, and
            takes a ``ChunkCausal`` of as many frames, which may have a window and sinks.
        group: process group, or ``DeviceMesh`` of one dimension, whose ranks share out the video
            of HunyuanVideo, HunyuanVideo 1.5, CogVideoX or Mochi; they must divide the heads.
            Every rank calls the transformer with the same input and gets the whole result;
            gradients of weights are parts that add up over the group. Dense layers and steps
            then run as sparse ones that keep everything. Wan and LTX take diffusers'
            ``enable_parallelism`` with a ulysses_degree instead.

    Returns:
        The transformer, or a list of them where several were given.

    Raises:
        TypeError, ValueError, NotImplementedError: in one sentence that names the argument; the
            transformer is unchanged then.
        RuntimeError: a group without torch.distributed initialised.
    """
    several = isinstance(transformer, (list, tuple))
    prepared = [
        _prepare(
            each,
            topk,
            tile,
            score,
            dense_layers,
            dense_steps,
            gates,
            refresh_every,
            tail,
            precision,
            mask,
            group,
        )
        for each in (transformer if several else [transformer])
    ]
    if not prepared:
        raise ValueError("transformer must be a transformer or several, but it is an empty list")
    steps = Steps()
    undo: list[Callable[[], None]] = []
    try:
        for module, plan, earlier, wanted in prepared:
            plan.steps = steps
            undo.append(partial(_replace, module, earlier, plan, gates_of(plan.layers)))
            _replace(module, plan, earlier, wanted)
    except BaseException:
        for back in reversed(undo):
            back()
        raise
    for each in transformer if several else [transformer]:
        warn_where_changes_are_not_seen(each)
    return list(transformer) if several else transformer


Prepared = tuple[Any, Plan, "Plan | None", dict[str, nn.Module]]
"""A transformer, what it is to get, what it has, and the gates it is to have by block."""


def _prepare(
    transformer: Any,
    topk: TopK | Budgets | Schedule,
    tile: Tile,
    score: Score,
    dense_layers: Sequence[int],
    dense_steps: int,
    gates: str | None,
    refresh_every: int,
    tail: bool,
    precision: LayerPrecision,
    mask: Rule | None,
    group: Any,
) -> Prepared:
    """Everything that may be refused, before anything is changed."""
    module: Any = getattr(transformer, "_orig_mod", transformer)
    family = family_of(module)
    layers = family.layers(module)
    dense = _checked_layers(dense_layers, len(layers))
    settings = Settings(
        topk=_checked_topk(topk, layers, dense),
        tile=_checked_tile(tile, gates),
        dense_steps=checks.integer("dense_steps", dense_steps, at_least=0),
        refresh_every=checks.integer("refresh_every", refresh_every, at_least=1),
        gates=gates,
        score=score,
        tail=checks.flag("tail", tail),
        precision=precisions.of_layers(precision, len(layers)),
        mask=_checked_mask(mask),
    )
    runs_of(score)
    for each in precisions.in_any_layer(settings.precision):
        precisions.check_tail(each, settings.tail)
    if gates not in (None, "coarse"):
        raise ValueError(f'gates must be None or "coarse", but it is {gates!r}')
    heads = heads_in(next(iter(layers.values())))
    sharding = None if group is None else _sharding_over(group, module, family, heads)
    earlier: Plan | None = getattr(module, PLAN, None)
    originals = {path: _original(attn, earlier) for path, attn in layers.items()}
    _check_replaceable(family, originals)
    processors = {
        layer: family.processor(original, settings)
        for layer, original in enumerate(originals.values())
        if layer not in dense or sharding is not None or mask is not None
    }
    wanted: dict[str, nn.Module] = {}
    if gates:
        wanted = gates_of(layers) | new_gates(module, layers, family.gate_bias)
    else:
        check_untrained(module, gates_of(layers))
        if not gates_of(layers):
            name_gates_beside(module)
    return module, Plan(family, settings, layers, processors, dense, sharding), earlier, wanted


def _replace(
    module: Any, plan: Plan | None, earlier: Plan | None, gates: Mapping[str, nn.Module]
) -> None:
    """Take out what is there of one plan, and put in another with its gates."""
    layers = (plan or earlier).layers  # type: ignore[union-attr]
    if earlier is not None:
        earlier.remove(module)
    put_gates(layers, gates)
    if plan is not None:
        plan.install(module)


def remove_vsa(transformer: Transformer) -> Transformer:
    """Undo ``apply_vsa``: diffusers' own attention again, bit for bit, and no gates.

    Save trained gates with ``gates_state_dict`` before. Without an earlier ``apply_vsa`` nothing
    happens.

    Args:
        transformer: any transformer that ``apply_vsa`` takes.

    Returns:
        The transformer.

    Raises:
        TypeError: a class that is not supported.
    """
    module: Any = getattr(transformer, "_orig_mod", transformer)
    family_of(module)
    plan: Plan | None = getattr(module, PLAN, None)
    if plan is not None:
        plan.remove(module)
        put_gates(plan.layers, {})
        warn_where_changes_are_not_seen(transformer)
    return transformer


def _checked_topk(
    topk: TopK | Budgets | Schedule, layers: Mapping[str, Any], dense: frozenset[int]
) -> TopK | Budgets | Schedule:
    heads = {path: heads_in(attn) for path, attn in layers.items()}
    of_steps = topk.steps.values() if isinstance(topk, StepSchedule) else (topk,)
    for each in of_steps:
        if isinstance(each, Budgets):
            each.check(heads, optional=[path for n, path in enumerate(layers) if n in dense])
        elif each is topk is None or (each is not None and not callable(each)):
            check(each, next(iter(heads.values())))
    return topk


def _checked_tile(tile: Tile, gates: str | None) -> Tile:
    if tile == "auto":
        return DEFAULT_TILE if gates else "auto"
    return checks.tile("tile", tile, SLOTS)


def _checked_mask(mask: object) -> Rule | None:
    if mask is not None and not isinstance(mask, RULES):
        raise TypeError(
            "mask must be None or a rule of vsa.masks, such as ChunkCausal, but it is of type "
            f"{type(mask).__name__}"
        )
    return mask


def _checked_layers(dense_layers: Sequence[int], count: int) -> frozenset[int]:
    numbers = list(dense_layers)
    for number in numbers:
        if not isinstance(number, int) or not -count <= number < count:
            raise ValueError(
                f"dense_layers must be numbers from {-count} to {count - 1}, as this transformer "
                f"has {count} layers, but one is {number!r}"
            )
    return frozenset(number % count for number in numbers)


def _original(attn: Any, earlier: Plan | None) -> Any:
    """A layer's processor from diffusers, under ours if an earlier call put one there."""
    ours = isinstance(attn.processor, SparseProcessor) and earlier is not None
    if ours:
        attn.processor.hand_settings_on()
    return attn.processor.original if ours else attn.processor


def _check_replaceable(family: Family, originals: dict[str, Any]) -> None:
    for path, original in originals.items():
        name = type(original).__name__
        if name not in family.replaces:
            way = way_back(name, "restore the default processors before apply_vsa")
            wanted = " or ".join(family.replaces)
            raise TypeError(
                f"the attention processor of {path} must be diffusers' {wanted}, but it is a "
                f"{name}: {way}"
            )


def _sharding_over(group: Any, transformer: Any, family: Family, heads: int) -> Sharding:
    """Check that a group can share out this transformer's video.

    Args:
        group: a process group or a DeviceMesh of one dimension.
        transformer: of the family.
        family: which families can.
        heads: of its attention.

    Raises:
        RuntimeError, TypeError, ValueError: a group that does not fit.
        NotImplementedError: a transformer that is sharded by other means, or not at all.
    """
    if family.sharded_by is None:
        raise NotImplementedError(
            f"group must be None for a {family.transformer}, whose video cannot be "
            "shared out over ranks: run it on one device"
        )
    if family.sharded_by == "diffusers":
        raise NotImplementedError(
            f"group must be None for a {family.transformer}, whose sequence diffusers shards "
            "itself: call enable_parallelism(config=ContextParallelConfig(ulysses_degree=...))"
        )
    if getattr(transformer.config, "image_condition_type", None) == "token_replace":
        raise NotImplementedError(
            'group must be None where image_condition_type is "token_replace", since the first '
            "frame's tokens are modulated apart: run this transformer on one device"
        )
    ranks = ranks_of(group)
    if ranks.rows > 1:
        raise ValueError(
            f"group must have one dimension, as text is on all ranks, but it is a mesh of "
            f"{ranks.rows}x{ranks.columns}: pass a slice of it"
        )
    if heads % ranks.columns:
        allowed = [str(n) for n in range(1, heads + 1) if heads % n == 0]
        raise ValueError(
            f"group has {ranks.columns} ranks, which cannot share out {heads} heads evenly: use "
            f"{', '.join(allowed)}"
        )
    return Sharding(ranks.heads, ranks.columns, ranks.rank)
