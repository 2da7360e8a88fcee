# SPDX-License-Identifier: Apache-2.0
"""Attention processors: diffusers' projections around ``vsa.attention``, one class per family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from vsa.distributed import ulysses_attention
from vsa.functional import attention
from vsa.integrations.diffusers.passes import OfThread, Remembered, recomputing
from vsa.integrations.diffusers.rotary import Rotary, of_pairs, turn_pairs
from vsa.integrations.diffusers.work import Work
from vsa.values.grid import Grid
from vsa.values.sequence import Sequence


class Given(NamedTuple):
    """What diffusers hands to a processor: see ``SparseProcessor.__call__``.

    ``perturbed`` is LTX-2's: 0 for videos of the batch whose values stand in for attention.
    """

    video: Tensor
    text: Tensor | None
    mask: Tensor | None
    rotary: Any
    perturbed: Tensor | None = None


REFRESH = (
    "refresh_every must be 1 where {what} recomputes layers later, when other selections are "
    "stored, but it is larger: call apply_vsa again without it for training"
)


class _Running(OfThread):
    def __init__(self) -> None:
        self.work: Work | None = None


class SparseProcessor:
    """What all families share: the call of diffusers' attention modules, and the sparse core.

    Attributes:
        plan_of_diffusers: whether diffusers can shard the sequence (enable_parallelism).
        original: the processor that was there before, which computes dense passes.
        settings: what ``apply_vsa`` was asked for, to be shown.
        work: what the pass that runs in this thread asks for; the transformer's pre-hook sets it.
        remembered: what passes have asked for so far, for recomputation outside of any.
    """

    plan_of_diffusers = True
    # diffusers sets these on every processor that has them: set_attention_backend, whose choice
    # dense passes follow, and enable_parallelism.
    _attention_backend: Any = None
    _parallel_config: Any = None

    def __init__(self, original: Any, settings: object = "") -> None:
        self.original = original
        self.settings = settings
        self._running = _Running()
        self.remembered: Remembered[Work] = Remembered()
        self._attention_backend = getattr(original, "_attention_backend", None)
        self._parallel_config = getattr(original, "_parallel_config", None)

    @property
    def work(self) -> Work | None:
        """In this thread; None outside of a pass of the transformer."""
        return self._running.work

    @work.setter
    def work(self, work: Work | None) -> None:
        self._running.work = work

    def _own_work(self, tokens: int) -> Work:
        """What the forward asked for that is now recomputed, or an error."""
        if not recomputing():
            raise ValueError(
                "the grid is unknown, because this layer ran outside of its transformer: "
                "call the transformer itself, or remove_vsa(transformer) first"
            )

        def fits(work: Work) -> bool:
            return work.group is not None or work.tokens == tokens

        if self.remembered.any(lambda work: work.store is not None):
            raise RuntimeError(REFRESH.format(what="activation checkpointing"))
        return self.remembered.only(fits, "a sparse layer")

    def hand_settings_on(self) -> None:
        """Give the original what diffusers has set here."""
        for name in ("_attention_backend", "_parallel_config"):
            if hasattr(self.original, name):
                setattr(self.original, name, getattr(self, name))

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Any:
        """Attend as diffusers' own processor does, sparsely.

        Args:
            attn: the attention module, whose projections are used.
            hidden_states: (B, T * H * W, channels), video tokens in raster order; under
                enable_parallelism, or with a group, this rank's share of them.
            encoder_hidden_states: (B, text, channels) in families with joint attention, all of
                it on every rank.
            attention_mask: which text tokens are real, in the family's own form.
            image_rotary_emb: cosines and sines, in the family's own form.

        Returns:
            What the family's own processor returns.

        Raises:
            ValueError: the tokens are not those of the transformer's input.
        """
        given = Given(hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        return self.sparse_or(partial(self.original, attn, *given[:4]), attn, given)

    def sparse_or(self, dense: Callable[[], Any], attn: Any, given: Given) -> Any:
        """Attend sparsely, or as diffusers does where this pass is dense."""
        work, tokens = self.work, given.video.shape[1]
        if work is None:
            work = self._own_work(tokens)
        if work.topk is None and not work.keeps:
            return dense()
        if work.group is None and tokens != work.tokens:
            raise ValueError(
                f"the grid of the transformer's input is {work.shape}, {work.tokens} tokens, but "
                f"this layer got {tokens}: VSA needs the whole video in raster order"
            )
        return self.attend(work, attn, given)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.settings}, backend=auto)"

    def attend(self, work: Work, attn: Any, given: Given) -> Any:
        """Project, attend with ``sparse`` and project back."""
        raise NotImplementedError


def sparse(
    work: Work,
    qkv: tuple[Tensor, Tensor, Tensor],
    gate: Tensor | None,
    *,
    prefix: int = 0,
    suffix: int = 0,
    text_valid: Tensor | None = None,
) -> Tensor:
    """The sparse core, with what an earlier step selected where ``work`` says so.

    Args:
        work: what this pass asks for.
        qkv: (B, S, heads, head_dim) each, S = prefix + T * H * W + suffix, or a shard of it.
        gate: (B, T * H * W, heads, head_dim) for the coarse branch, or None; a shard likewise.
            Of the whole sequence where ``work.packed`` says what else has coarse tiles.
        prefix: text tokens before the video.
        suffix: text tokens after it.
        text_valid: (B, prefix + suffix) bool.

    Returns:
        (B, S, heads * head_dim).
    """
    q, k, v = qkv
    # A norm kept in fp32 would leave q and k in another type than v.
    q, k = q.to(v.dtype), k.to(v.dtype)
    grid = Grid(work.shape, work.tile, prefix, suffix)
    layout: Grid | Sequence = grid
    if work.topk is None:  # a dense pass that diffusers' attention cannot do
        gate = None
    if gate is not None and work.packed is not None:
        layout = work.packed
    elif gate is not None and grid.text:
        gate = nn.functional.pad(gate, (0, 0, 0, 0, prefix, suffix))
    known = work.store.fitting(layout, q.shape[0]) if work.store and work.reuse else None
    topk = None if known is not None else work.topk
    attend: Callable[..., Any] = attention
    if work.group is not None:
        attend = partial(ulysses_attention, group=work.group)
    if work.sharding is not None:
        attend = partial(attend, text="replicated")
    if work.topk is None:
        topk = 1.0
    out = attend(
        q,
        k,
        v,
        topk,
        grid=layout,
        gate_coarse=gate,
        selection=known,
        score=work.score,
        text_valid=text_valid,
        tail=work.tail,
        mask=work.mask if known is None else None,  # a selection brings its own
        precision=work.precision,
        return_selection=work.store is not None or work.note is not None,
    )
    if isinstance(out, tuple):
        out, chosen = out
        if work.store is not None:
            work.store.selection = chosen
        if work.note is not None:
            # Its tiles are those of the video either way.
            of_video = replace(chosen, grid=grid, kv_grid=grid, sequences=None)
            work.note(q, k, of_video, v, text_valid)
    return out.flatten(2)


def heads_in(attn: Any) -> int:
    """How many heads a layer has."""
    return attn.num_heads if hasattr(attn, "num_heads") else attn.heads


def query_of(attn: Any) -> Any:
    """A layer's projection to queries."""
    return attn.to_query if hasattr(attn, "to_query") else attn.to_q


def projections(attn: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values of self-attention, by one product where fused.

    Raises:
        ValueError: where one product would leave an adapter out, as diffusers' own processors do
            without a word (findings/fused_projections.sh).
    """
    if not attn.fused_projections:
        return attn.to_q(x), attn.to_k(x), attn.to_v(x)
    for name in ("to_q", "to_k", "to_v"):
        layer = getattr(attn, name)
        if hasattr(layer, "base_layer") and not getattr(layer, "disable_adapters", False):
            raise ValueError(
                f"transformer must have no adapters where its projections are fused, which leaves "
                f"them out, but {name} has one: call transformer.unfuse_qkv_projections()"
            )
    return attn.to_qkv(x).chunk(3, dim=-1)


def heads_of(x: Tensor, attn: Any) -> Tensor:
    """(B, S, heads * head_dim) -> (B, S, heads, head_dim)."""
    return x.unflatten(2, (heads_in(attn), -1))


def gate_of(attn: Any, hidden_states: Tensor) -> Tensor | None:
    """The coarse gate, (B, S, heads, head_dim), without activation; None where there is none."""
    projection = getattr(attn, "to_gate_compress", None)
    return None if projection is None else heads_of(projection(hidden_states), attn)


def project_out(attn: Any, x: Tensor) -> Tensor:
    """The output projection and its dropout."""
    return attn.to_out[1](attn.to_out[0](x))


class WanSparseProcessor(SparseProcessor):
    """Wan, ChronoEdit, SkyReels-V2: video tokens only, norms over all heads, rotation per head."""

    def attend(self, work: Work, attn: Any, given: Given) -> Tensor:
        """Attend; -> (B, S, channels)."""
        x = given.video
        q, k, v = projections(attn, x)
        q, k, v = heads_of(attn.norm_q(q), attn), heads_of(attn.norm_k(k), attn), heads_of(v, attn)
        if given.rotary is not None:
            q, k = turn_pairs((q, k), *of_pairs(given.rotary))
        return project_out(attn, sparse(work, (q, k, v), gate_of(attn, x)))


class LTXSparseProcessor(SparseProcessor):
    """LTX: video tokens and keyframes, norms and rotation over all heads."""

    def attend(self, work: Work, attn: Any, given: Given) -> Tensor:
        """Attend; -> (B, S, channels)."""
        x = given.video
        q, k, v = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(x)), attn.to_v(x)
        if given.rotary is not None:
            q, k = turn_pairs((q, k), *of_pairs(given.rotary))
        q, k, v = heads_of(q, attn), heads_of(k, attn), heads_of(v, attn)
        gate = gate_of(attn, x)
        if gate is not None and (work.before or work.after):
            gate = gate[:, work.before : x.shape[1] - work.after]
        out = sparse(work, (q, k, v), gate, prefix=work.before, suffix=work.after)
        return project_out(attn, out)
