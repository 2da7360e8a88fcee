# SPDX-License-Identifier: Apache-2.0
"""MiniMax-H3: one packed sequence of text, conditions, audio and the video that is denoised.

Its attention is one self-attention of all rows, without a mask. The rows of the video are the last
run of ``video_indices``; their grid is read from ``position_ids``. All other rows are attended by
everything and attend everything.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from vsa.integrations.diffusers.coordinates import Call, Layout, raster_of
from vsa.integrations.diffusers.processors import (
    Given,
    SparseProcessor,
    gate_of,
    heads_of,
    project_out,
    projections,
    sparse,
)
from vsa.integrations.diffusers.rotary import Rotary, turn_halves
from vsa.integrations.diffusers.work import Work

REFERENCES = (
    "gates must be None where references come before the video, as position_ids say by a time of "
    "{time:g} for its first frame after {text} rows of text: hosts cut references into tiles in "
    'ways that differ, and a coarse branch is over all tiles; call apply_vsa without gates="coarse"'
)


def layout_of_packed(config: Any, call: Call) -> Layout:
    """The layout of a packed sequence, from the arguments of the transformer's forward.

    Reading indices and positions waits for the device.

    Raises:
        ValueError: rows that are not those of a video in raster order.
    """
    positions = call["position_ids"]
    rows = call["video_indices"].detach().cpu()
    counts = {name: call[f"{name}_indices"].numel() for name in ("text", "video", "audio")}
    length = positions.shape[0]
    if not len(rows) or sum(counts.values()) != length:
        raise ValueError(
            f"video_indices must name rows of video, and with those of audio and text all "
            f"{length} rows of position_ids, but they are {counts['video']}, {counts['audio']} "
            f"and {counts['text']}"
        )
    breaks = torch.nonzero(rows.diff() != 1).flatten()
    start = int(rows[int(breaks[-1]) + 1 if len(breaks) else 0])
    stop = int(rows[-1]) + 1
    video = positions[start:stop].detach().cpu().double()
    found = raster_of(video.T)
    if found is None:
        raise ValueError(
            "position_ids must be those of whole frames in raster order for the last "
            f"{stop - start} rows of video_indices, but they are not, so that VSA cannot know the "
            "grid"
        )
    start += found.before
    stop -= found.after
    segments, refused = _segments(call, start, stop, float(video[found.before, 0]))
    return Layout(found.shape, start, length - stop, segments=segments, ungated=refused)


def _segments(call: Call, start: int, stop: int, time: float) -> tuple[tuple[int, ...], str | None]:
    """Tokens of text, conditions and audio before the video, and why gates have no tiles there."""
    text, audio = call["text_indices"].numel(), call["audio_indices"].numel()
    conditions = start - text - audio
    length = call["position_ids"].shape[0]
    expected = torch.arange(length)
    in_order = (
        stop == length
        and conditions >= 0
        and torch.equal(call["text_indices"].detach().cpu(), expected[:text])
        and torch.equal(call["audio_indices"].detach().cpu(), expected[start - audio : start])
    )
    if not in_order:
        return (), (
            "gates must be None where rows are not packed as text, conditions, audio, video, as "
            "the coarse branch was trained, but text_indices and audio_indices say another order: "
            'call apply_vsa without gates="coarse"'
        )
    if time != text:
        return (), REFERENCES.format(time=time, text=text)
    return tuple(each for each in (text, conditions, audio) if each), None


class MiniMaxH3SparseProcessor(SparseProcessor):
    """MiniMax-H3: norms per head, rotation of the first channels, one sequence for everything."""

    def __call__(  # type: ignore[override]  # diffusers' own is called so
        self,
        attn: Any,
        hidden_states: Tensor,
        rotary_emb: Rotary | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend as diffusers' own processor does.

        Args:
            attn: the attention module, whose projections are used.
            hidden_states: (B, rows, channels), the packed sequence.
            rotary_emb: cosines and sines, (rows, channels that are rotated) each.
            attention_mask: None.

        Returns:
            (B, rows, channels).
        """
        dense = partial(self.original, attn, hidden_states, rotary_emb, attention_mask)
        return self.sparse_or(dense, attn, Given(hidden_states, None, attention_mask, rotary_emb))

    def attend(self, work: Work, attn: Any, given: Given) -> Tensor:
        """Attend; -> (B, rows, channels)."""
        if given.mask is not None:
            raise ValueError("attention_mask must be None for MiniMax-H3, but it is a tensor")
        x = given.video
        q, k, v = (heads_of(each, attn) for each in projections(attn, x))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if given.rotary is not None:
            q, k = turn_first((q, k), given.rotary)
        gate = gate_of(attn, x)
        return project_out(
            attn, sparse(work, (q, k, v), gate, prefix=work.before, suffix=work.after)
        )


def turn_first(xs: tuple[Tensor, Tensor], rotary: Rotary) -> tuple[Tensor, ...]:
    """Rotate the first channels of every head, with angles in the type of x, as diffusers does.

    Args:
        xs: (B, rows, heads, head_dim) each.
        rotary: (rows, channels that are rotated) each; every angle stands twice, in halves.
    """
    channels = rotary[0].shape[-1]
    cos, sin = (table[:, None, : channels // 2].to(xs[0].dtype) for table in rotary)
    turned = turn_halves(tuple(x[..., :channels] for x in xs), cos, sin)
    return tuple(
        torch.cat((new, x[..., channels:]), dim=-1) for new, x in zip(turned, xs, strict=True)
    )
