# SPDX-License-Identifier: Apache-2.0
"""Attention processors of families that attend within the video and are called in their own way."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from vsa.integrations.diffusers.processors import (
    Given,
    SparseProcessor,
    gate_of,
    heads_of,
    project_out,
    sparse,
)
from vsa.integrations.diffusers.rotary import Rotary, of_pairs, turn_halves, turn_pairs
from vsa.integrations.diffusers.work import Work


class LTX2SparseProcessor(SparseProcessor):
    """LTX-2: the video's own attention; keyframes and references, appended, attend everything."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: Rotary | None = None,
        key_rotary_emb: Rotary | None = None,
        perturbation_mask: Tensor | None = None,
        all_perturbed: Any = None,
    ) -> Tensor:
        """Attend as diffusers' own processors do.

        Args:
            attn: the attention module, whose projections are used.
            hidden_states: (B, tokens, channels), the video in raster order, then what is appended.
            encoder_hidden_states: None.
            attention_mask: None.
            query_rotary_emb: cosines and sines, for queries and keys.
            key_rotary_emb: None.
            perturbation_mask: (B, 1, 1), 0 where values stand in for attention.
            all_perturbed: whether that is so for the whole batch.

        Returns:
            (B, tokens, channels).
        """
        given = Given(hidden_states, None, attention_mask, query_rotary_emb, perturbation_mask)
        perturbed: dict[str, Any] = {}
        if perturbation_mask is not None or all_perturbed is not None:
            perturbed = {"perturbation_mask": perturbation_mask, "all_perturbed": all_perturbed}
        tensors = hidden_states, encoder_hidden_states, attention_mask
        rotary = query_rotary_emb, key_rotary_emb
        dense = partial(self.original, attn, *tensors, *rotary, **perturbed)
        if all_perturbed is not None and bool(all_perturbed):
            return dense()  # which attends nothing then
        return self.sparse_or(dense, attn, given)

    def attend(self, work: Work, attn: Any, given: Given) -> Tensor:
        """Attend; -> (B, tokens, channels)."""
        x = given.video
        q, k, v = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(x)), attn.to_v(x)
        halves = attn.rope_type == "split"
        if given.rotary is not None and not halves:
            q, k = turn_pairs((q, k), *of_pairs(given.rotary))
        q, k, v = (heads_of(each, attn) for each in (q, k, v))
        if given.rotary is not None and halves:
            q, k = turn_halves((q, k), *(table.transpose(1, 2) for table in given.rotary))
        gate = gate_of(attn, x)
        if gate is not None and work.after:
            gate = gate[:, : x.shape[1] - work.after]
        out = sparse(work, (q, k, v), gate, suffix=work.after)
        if given.perturbed is not None:
            out = torch.lerp(v.flatten(2), out, given.perturbed)
        if attn.to_gate_logits is not None:
            weights = 2.0 * torch.sigmoid(attn.to_gate_logits(x))
            out = (heads_of(out, attn) * weights.unsqueeze(-1)).flatten(2)
        return project_out(attn, out)


class Kandinsky5SparseProcessor(SparseProcessor):
    """Kandinsky 5: norms per head in fp32, rotation by matrices, rounded to bf16 in any model."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        rotary_emb: Tensor | None = None,
        sparse_params: Any = None,
    ) -> Tensor:
        """Attend as diffusers' own processor does.

        Args:
            attn: the attention module, whose projections are used.
            hidden_states: (B, T * H * W, channels) in raster order.
            encoder_hidden_states: None.
            rotary_emb: (B or 1, T * H * W, 1, head_dim / 2, 2, 2), a rotation for every pair.
            sparse_params: None.

        Returns:
            (B, T * H * W, channels).
        """
        dense = partial(
            self.original, attn, hidden_states, encoder_hidden_states, rotary_emb, sparse_params
        )
        return self.sparse_or(dense, attn, Given(hidden_states, None, None, rotary_emb))

    def attend(self, work: Work, attn: Any, given: Given) -> Tensor:
        """Attend; -> (B, S, channels)."""
        x = given.video
        q, k, v = (heads_of(to(x), attn) for to in (attn.to_query, attn.to_key, attn.to_value))
        q, k = attn.query_norm(q.float()), attn.key_norm(k.float())
        q, k = q.to(v.dtype), k.to(v.dtype)
        if given.rotary is not None:
            cos, sin = given.rotary[..., 0, 0], given.rotary[..., 1, 0]
            turned = turn_pairs((q.float(), k.float()), cos, sin)
            q, k = (each.to(torch.bfloat16).to(v.dtype) for each in turned)
        return attn.out_layer(sparse(work, (q, k, v), gate_of(attn, x)))


class Kandinsky6SparseProcessor(SparseProcessor):
    """Kandinsky 6: norms per head, rotation by matrices in fp32; a reference frame may follow."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        rotary_emb: Tensor | None = None,
        rotary_emb_kv: Any = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend as diffusers' own processor does.

        Args:
            attn: the attention module, whose projections are used.
            hidden_states: (B, T * H * W, channels) in raster order.
            encoder_hidden_states: None.
            rotary_emb: (T * H * W, 1, head_dim / 2, 2, 2), a rotation for every pair.
            rotary_emb_kv: the same.
            attn_mask: None.

        Returns:
            (B, T * H * W, channels).
        """
        tensors = hidden_states, encoder_hidden_states, rotary_emb, rotary_emb_kv, attn_mask
        given = Given(hidden_states, None, attn_mask, rotary_emb)
        return self.sparse_or(partial(self.original, attn, *tensors), attn, given)

    def attend(self, work: Work, attn: Any, given: Given) -> Tensor:
        """Attend; -> (B, S, channels)."""
        x = given.video
        q, k, v = (heads_of(to(x), attn) for to in (attn.to_query, attn.to_key, attn.to_value))
        q, k = attn.query_norm(q), attn.key_norm(k)
        if given.rotary is not None:
            cos, sin = given.rotary[..., 0, 0], given.rotary[..., 1, 0]
            q, k = turn_pairs((q, k), cos.float(), sin.float())
        gate = gate_of(attn, x)
        if gate is not None and work.after:
            gate = gate[:, : x.shape[1] - work.after]
        return attn.out_layer(sparse(work, (q, k, v), gate, suffix=work.after))


class CosmosSparseProcessor(SparseProcessor):
    """Cosmos: norms per head, rotation of halves in fp32."""

    def attend(self, work: Work, attn: Any, given: Given) -> Tensor:
        """Attend; -> (B, S, channels)."""
        x = given.video
        q, k, v = (heads_of(to(x), attn) for to in (attn.to_q, attn.to_k, attn.to_v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if given.rotary is not None:
            half = q.shape[-1] // 2
            q, k = turn_halves((q, k), *(table[:, None, :half] for table in given.rotary))
        return project_out(attn, sparse(work, (q, k, v), gate_of(attn, x)))


class AnyFlowSparseProcessor(SparseProcessor):
    """AnyFlow in both directions of time: as Wan, with rotations as complex numbers."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        """Attend as diffusers' own processor does.

        Args:
            attn: the attention module, whose projections are used.
            hidden_states: (B, T * H * W, channels) in raster order.
            encoder_hidden_states: None.
            attention_mask: None.
            rotary_emb: "query" and "key", (1, 1, T * H * W, head_dim / 2) complex each.

        Returns:
            (B, T * H * W, channels).
        """
        given = Given(hidden_states, None, attention_mask, rotary_emb)
        dense = partial(self.original, attn, hidden_states, None, attention_mask, rotary_emb)
        return self.sparse_or(dense, attn, given)

    def attend(self, work: Work, attn: Any, given: Given) -> Tensor:
        """Attend; -> (B, S, channels)."""
        x = given.video
        q, k, v = attn.to_q(x), attn.to_k(x), attn.to_v(x)
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        q, k, v = (heads_of(each, attn) for each in (q, k, v))
        if given.rotary is not None:
            angles = (given.rotary[name].transpose(1, 2) for name in ("query", "key"))
            pairs = zip((q, k), angles, strict=True)
            q, k = (turn_pairs((y,), angle.real, angle.imag)[0] for y, angle in pairs)
        return project_out(attn, sparse(work, (q, k, v), gate_of(attn, x)))
