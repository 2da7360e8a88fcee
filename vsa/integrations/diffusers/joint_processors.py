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
        length = text.shape[1]
        if getattr(attn, "add_q_proj", None) is None:
            # One product for both, as diffusers does: hooks on a projection see the same tokens.
            both = torch.cat(self._ordered(x, text), dim=1)
            q, k, v = self._project(attn, both, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
            (q, text_q), (k, text_k) = self._parted(q, length), self._parted(k, length)
        else:
            q, k, v = self._project(attn, x, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
            added = ("add_q_proj", "add_k_proj", "add_v_proj")
            norms = ("norm_added_q", "norm_added_k")
            text_q, text_k, text_v = self._project(attn, text, added, norms)
            v = torch.cat(self._ordered(v, text_v), dim=1)
        if given.rotary is not None:
            cos, sin = given.rotary
            if work.sharding is not None:
                cos, sin = (work.sharding.part(table, 0) for table in (cos, sin))
            q, k = self.turn(q, k, (cos, sin))
        q = torch.cat(self._ordered(q, text_q), dim=1)
        k = torch.cat(self._ordered(k, text_k), dim=1)
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

    def _ordered(self, video: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """The two as they stand in the sequence."""
        return (text, video) if self.text_first else (video, text)

    def _parted(self, x: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Video and text of a sequence whose text has this length."""
        if self.text_first:
            return x[:, length:], x[:, :length]
        return x[:, :-length], x[:, -length:]

    def _split(self, attn: Any, out: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Part the streams and project each with what its block has."""
        video, text = self._parted(out, length)
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
        return self._parted(project_out(attn, out), length)


class EasyAnimateSparseProcessor(CogVideoXSparseProcessor):
    """EasyAnimate: text first, with projections of its own in blocks that have two streams."""

    def _split(self, attn: Any, out: Tensor, length: int) -> tuple[Tensor, Tensor]:
        video, text = self._parted(out, length)
        video = project_out(attn, video)
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
