# SPDX-License-Identifier: Apache-2.0
"""Attention processors of families that hold video and text in one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from vsa.integrations.diffusers.processors import (
    Given,
    SparseProcessor,
    gate_of,
    heads_of,
    project_out,
    sparse,
)
from vsa.integrations.diffusers.rotary import Rotary, of_pairs, turn_pairs
from vsa.integrations.diffusers.work import Work


class JointSparseProcessor(SparseProcessor):
    """Video and text in one sequence; what follows is what the families differ in."""

    plan_of_diffusers = False
    text_first = False

    def turn(self, q: Tensor, k: Tensor, rotary: Rotary) -> Sequence[Tensor]:
        """Rotate the video's queries and keys, (B, S, heads, head_dim) each."""
        cos, sin = (table.unsqueeze(1) for table in of_pairs(rotary))
        return turn_pairs((q, k), cos, sin)

    def text_valid(self, mask: Tensor | None, length: int) -> Tensor | None:
        """(B, length) bool, which text tokens are real; None for all."""
        return None if mask is None else mask[:, -length:].bool()

    def attend(self, work: Work, attn: Any, given: Given) -> tuple[Tensor, Tensor]:
        """Attend; -> video (B, S, channels) and text (B, text, channels)."""
        x, text = given.video, given.text
        if text is None:
            raise ValueError(
                "encoder_hidden_states is None, but joint attention needs the text tokens"
            )
        video_qkv = self._project(attn, x, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
        if given.rotary is not None:
            q, k, v = video_qkv
            cos, sin = given.rotary
            if work.sharding is not None:
                cos, sin = (work.sharding.part(table, 0) for table in (cos, sin))
            video_qkv = [*self.turn(q, k, (cos, sin)), v]
        if getattr(attn, "add_q_proj", None) is None:
            text_qkv = self._project(attn, text, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
        else:
            added = ("add_q_proj", "add_k_proj", "add_v_proj")
            text_qkv = self._project(attn, text, added, ("norm_added_q", "norm_added_k"))
        order = (text_qkv, video_qkv) if self.text_first else (video_qkv, text_qkv)
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(*order, strict=True))
        length = text.shape[1]
        valid = self.text_valid(given.mask, length)
        if valid is not None and work.before:
            valid = torch.cat([valid.new_ones(valid.shape[0], work.before), valid], dim=1)
        gate = gate_of(attn, x)
        out = sparse(
            work,
            (q, k, v),
            gate if gate is None else gate[:, work.before :],
            prefix=length if self.text_first else work.before,
            suffix=0 if self.text_first else length,
            text_valid=valid,
        )
        return self._split(attn, out, length)

    @staticmethod
    def _project(
        attn: Any, x: Tensor, projections: tuple[str, ...], norms: tuple[str, str]
    ) -> list[Tensor]:
        q, k, v = (heads_of(getattr(attn, name)(x), attn) for name in projections)
        norm_q, norm_k = (getattr(attn, name, None) for name in norms)
        return [q if norm_q is None else norm_q(q), k if norm_k is None else norm_k(k), v]

    def _split(self, attn: Any, out: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Part the streams and project each with what its block has."""
        video, text = out[:, :-length], out[:, -length:]
        # A single-stream block projects both itself, together with its feed-forward.
        if getattr(attn, "to_out", None) is not None:
            video = project_out(attn, video)
        if getattr(attn, "to_add_out", None) is not None:
            text = attn.to_add_out(text)
        return video, text


class HunyuanVideoSparseProcessor(JointSparseProcessor):
    """HunyuanVideo: text last, masked as (B, 1, 1, video + text)."""

    def text_valid(self, mask: Tensor | None, length: int) -> Tensor | None:
        """(B, length) bool."""
        return None if mask is None else mask[:, 0, 0, -length:].bool()


class FramepackSparseProcessor(HunyuanVideoSparseProcessor):
    """Framepack: as HunyuanVideo, with earlier frames before the video, which attend everything."""


class HunyuanVideo15SparseProcessor(JointSparseProcessor):
    """HunyuanVideo 1.5: text last, masked as (B, text)."""


class CogVideoXSparseProcessor(JointSparseProcessor):
    """CogVideoX, ConsisID: text first, never masked, both through one output projection."""

    text_first = True

    def turn(self, q: Tensor, k: Tensor, rotary: Rotary) -> Sequence[Tensor]:
        """Rotate as diffusers does: the caller gives the tables, with angles of any kind."""
        return tuple(apply_rotary_emb(x, rotary, sequence_dim=1) for x in (q, k))

    def text_valid(self, mask: Tensor | None, length: int) -> None:
        """All text is real; a mask of another kind has no meaning here."""
        if mask is not None:
            raise ValueError(
                "attention_mask must be None where text is never masked, but it is a tensor"
            )

    def _split(self, attn: Any, out: Tensor, length: int) -> tuple[Tensor, Tensor]:
        out = project_out(attn, out)
        return out[:, length:], out[:, :length]


class EasyAnimateSparseProcessor(CogVideoXSparseProcessor):
    """EasyAnimate: text first, with projections of its own in blocks that have two streams."""

    def _split(self, attn: Any, out: Tensor, length: int) -> tuple[Tensor, Tensor]:
        video, text = project_out(attn, out[:, length:]), out[:, :length]
        # Blocks of one stream leave the text as attention gave it.
        if getattr(attn, "to_add_out", None) is not None:
            text = attn.to_add_out(text)
        return video, text


class MochiSparseProcessor(JointSparseProcessor):
    """Mochi: text last, masked as (B, text), rotation with angles per head."""

    def turn(self, q: Tensor, k: Tensor, rotary: Rotary) -> Sequence[Tensor]:
        """Rotate in fp32."""
        turned = turn_pairs((q.float(), k.float()), *rotary)
        return tuple(x.to(q.dtype) for x in turned)
