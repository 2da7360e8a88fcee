# SPDX-License-Identifier: Apache-2.0
"""Random calls over sequences, their answers by the definition, and how close is close enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import sdpa_kernel

import vsa
from vsa import Segment
from vsa.verify import parity, sequence_reference
from vsa.verify.sequence_reference import Part, tiles_of_parts


@dataclass(frozen=True)
class Case:
    """A call of ``vsa.attention`` over sequences."""

    segments: Sequence[Any]
    topk: Any = 2
    kv_segments: Sequence[Any] | None = None
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 16
    gates: Sequence[str] = ("gate_coarse",)
    text_valid: bool = False
    scale: float | None = None
    dtype: torch.dtype = torch.float64

    @property
    def sequence(self) -> vsa.Sequence:
        return vsa.Sequence(self.segments)

    @property
    def kv_sequence(self) -> vsa.Sequence:
        return self.sequence if self.kv_segments is None else vsa.Sequence(self.kv_segments)

    def valid(self) -> Tensor | None:
        """Which text is real: some, and in the first element nothing of its second segment."""
        if not self.text_valid:
            return None
        generator = torch.Generator().manual_seed(5)
        found = torch.rand(self.batch, self.sequence.text, generator=generator) < 0.6
        flat = [each.tokens for each in self.sequence.segments if not each.is_video]
        if len(flat) > 1:
            found[0, flat[0] : flat[0] + flat[1]] = False
        return found

    def tensors(self, seed: int = 0) -> dict[str, Tensor]:
        """q, k, v, the gates; NaN in all that is invalid."""
        generator = torch.Generator().manual_seed(seed)
        valid = self.valid()
        found = {}
        for name, of, heads in (
            ("q", self.sequence, self.heads),
            ("k", self.kv_sequence, self.kv_heads),
            ("v", self.kv_sequence, self.kv_heads),
            *((gate, self.sequence, self.heads) for gate in self.gates),
        ):
            shape = self.batch, of.length, heads, self.head_dim
            x = torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)
            if valid is not None:
                x = x.masked_fill(~real_tokens(of, valid)[:, :, None, None], float("nan"))
            found[name] = x
        return found

    def upstream(self) -> tuple[Tensor, Tensor]:
        """Gradients of out and of lse."""
        generator = torch.Generator().manual_seed(9)
        shape = self.batch, self.sequence.length, self.heads, self.head_dim
        grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        grad_lse = torch.randn(shape[0], shape[2], shape[1], generator=generator).double()
        return grad.to(self.dtype), grad_lse


def real_tokens(sequence: vsa.Sequence, valid: Tensor) -> Tensor:
    """(B, S) bool."""
    found, first = [], 0
    for segment in sequence.segments:
        if segment.is_video:
            found.append(torch.ones(len(valid), segment.tokens, dtype=torch.bool))
        else:
            found.append(valid[:, first : first + segment.tokens])
            first += segment.tokens
    return torch.cat(found, 1)


def parts_of(sequence: vsa.Sequence) -> list[Part]:
    """In the words of the specification."""
    found = []
    for each in sequence.segments:
        shape, tile = each.shape, each.tile
        if isinstance(shape, int):
            shape, tile = (1, 1, shape), (1, 1, tile)
        topk, mass = each.topk, 0.0
        if isinstance(topk, vsa.TopP):
            topk, mass = topk.floor, topk.mass
        kept, dense = each.keys == "kept", each.queries == "dense"
        found.append(Part(shape, tile, not each.is_video, kept, dense, each.coarse, topk, mass))
    return found


def truth(case: Case, tensors: dict[str, Tensor], **options: Any) -> tuple[Tensor, ...]:
    """Out, the choice and lse by the definition."""
    topk, mass = case.topk, 0.0
    if isinstance(topk, vsa.TopP):
        topk, mass = topk.floor, topk.mass
    kv_parts = None if case.kv_segments is None else parts_of(case.kv_sequence)
    return sequence_reference.attention(
        tensors["q"],
        tensors["k"],
        tensors["v"],
        parts_of(case.sequence),
        topk,
        mass=mass,
        kv_parts=kv_parts,
        gate_coarse=tensors.get("gate_coarse"),
        gate_fine=tensors.get("gate_fine"),
        scale=case.scale,
        valid=case.valid(),
        **options,
    )


def attend(case: Case, tensors: dict[str, Tensor], device: str = "cpu", **options: Any) -> Any:
    """Out, the choice and lse of ``vsa.attention``."""
    valid = options.pop("text_valid") if "text_valid" in options else case.valid()
    return vsa.attention(
        *(tensors[name] for name in "qkv"),
        case.topk,
        grid=case.sequence,
        kv_grid=None if case.kv_segments is None else case.kv_sequence,
        gate_coarse=tensors.get("gate_coarse"),
        gate_fine=tensors.get("gate_fine"),
        scale=case.scale,
        text_valid=None if valid is None else valid.to(device),
        return_selection=True,
        return_lse=True,
        **options,
    )


def gradients(
    case: Case, tensors: dict[str, Tensor], out: Tensor, lse: Tensor
) -> dict[str, Tensor]:
    """Of all tensors, from out and lse where it is finite."""
    grad, grad_lse = (x.to(out.device) for x in case.upstream())
    real = torch.ones(case.batch, case.sequence.length, dtype=torch.bool, device=out.device)
    if (valid := case.valid()) is not None:
        real = real_tokens(case.sequence, valid).to(out.device)
    some = real[:, None].expand(lse.shape) & lse.isfinite()
    loss = (out.double() * grad.double())[real].sum()
    loss = loss + (lse.double() * grad_lse)[some].sum()
    found = torch.autograd.grad(
        loss, list(tensors.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(tensors, found, strict=True))


def errors_of_sdpa(case: Case, chosen: Tensor) -> dict[str, float]:
    """How far PyTorch's attention is off in this type on the same keys: out, and each gradient."""
    allowed = allowed_tokens(case, chosen)
    valid, group = case.valid(), case.heads // case.kv_heads
    tensors = {name: x.nan_to_num(0) for name, x in case.tensors().items()}
    grad = case.upstream()[0]
    if valid is not None:
        grad = grad * real_tokens(case.sequence, valid)[:, :, None, None]
    idle = ~allowed.any(-1, keepdim=True)
    results = []
    for dtype in (torch.float64, case.dtype):
        q, k, v = (tensors[name].to(dtype).transpose(1, 2).requires_grad_() for name in "qkv")
        scores = (x.repeat_interleave(group, 1) for x in (k, v))
        with sdpa_kernel(parity.KERNELS):  # whatever the process has switched off
            out = functional.scaled_dot_product_attention(
                q, *scores, attn_mask=allowed | idle, scale=case.scale
            ).masked_fill(idle, 0)
        grads = torch.autograd.grad(out, (q, k, v), grad.transpose(1, 2).to(dtype))
        results.append((out.detach(), *grads))
    names = ("out", "q", "k", "v")
    return {name: parity.error(x, y) for name, y, x in zip(names, *results, strict=True)}


def allowed_tokens(case: Case, chosen: Tensor) -> Tensor:
    """(B, heads, S_q, S_k) bool: which keys each query attends under a choice."""
    parts, kv_parts = parts_of(case.sequence), parts_of(case.kv_sequence)
    valid = case.valid()
    shape = case.batch, case.heads, case.sequence.length, case.kv_sequence.length
    allowed = torch.zeros(shape, dtype=torch.bool)
    for b in range(case.batch):
        of = None if valid is None else valid[b].tolist()
        rows, columns = tiles_of_parts(parts, of), tiles_of_parts(kv_parts, of)
        competing = [j for j, tile in enumerate(columns) if not kv_parts[tile.part].kept]
        sparse = [i for i, tile in enumerate(rows) if not parts[tile.part].dense]
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                yes = torch.ones(case.heads, dtype=torch.bool)
                if i in sparse and j in competing:
                    yes = chosen[b, :, sparse.index(i), competing.index(j)]
                block = torch.zeros(shape[2:], dtype=torch.bool)
                block[torch.tensor(row.tokens, dtype=torch.long)[:, None], column.tokens] = True
                allowed[b] |= block & yes[:, None, None]
    return allowed


def check(case: Case, backend: str = "torch", device: str = "cpu", wants: bool = True) -> None:
    """Out, choice, lse and gradients are the definition's."""
    tensors = case.tensors()
    given = {name: x.to(device).requires_grad_(wants) for name, x in tensors.items()}
    out, selection, lse = attend(case, given, device, backend=backend)
    chosen = selection.mask().cpu()
    wide = {name: x.double().detach().requires_grad_() for name, x in tensors.items()}
    exact, by_definition, exact_lse = truth(case, wide)
    assert torch.equal(chosen, by_definition)
    assert out.dtype == case.dtype
    assert lse.dtype == torch.promote_types(case.dtype, torch.float32)
    of_sdpa = errors_of_sdpa(case, chosen)
    found, wanted = {"out": out}, {"out": exact.detach()}
    if wants:
        found |= gradients(case, given, out, lse)
        wanted |= gradients(case, wide, exact, exact_lse)
    for name, x in found.items():
        times = excess(x, wanted[name], of_sdpa.get(name, of_sdpa["out"]), case.dtype)
        assert times <= 2, (name, times)
    nothing = exact_lse == float("-inf")
    assert torch.equal(lse.cpu() == float("-inf"), nothing)
    close = 1e-12 if case.dtype == torch.float64 else 1e-4
    assert (lse.detach().cpu().double() - exact_lse)[~nothing].abs().max() < close


def excess(found: Tensor, exact: Tensor, of_sdpa: float, dtype: torch.dtype) -> float:
    """Error as a multiple of PyTorch's, or of rounding the truth once where that is more."""
    found = found.detach().cpu()
    if dtype is torch.float64:
        return parity.error(found, exact) / 1e-12
    return parity.error(found, exact) / max(of_sdpa, parity.error(exact.to(dtype), exact), 1e-30)


TEXT, AUDIO = Segment(20, 16, coarse=True), Segment(5, coarse=True)
VIDEO, OTHER = Segment((2, 5, 3), (2, 2, 2)), Segment((1, 4, 7), (1, 4, 3))
CASES = {
    # What VSA-H3 packs: text, conditions, audio, the video.
    "h3": Case((TEXT, Segment(9, coarse=True), AUDIO, VIDEO), batch=2),
    "h3, prefix competes": Case((Segment(70, keys="compete"), Segment(9, keys="compete"), VIDEO)),
    # With a reference video in between that keeps a share of its own.
    "ref2va": Case((TEXT, 13, replace(OTHER, topk=0.5), 4, VIDEO), 0.4, heads=4, kv_heads=2),
    "128 tokens": Case((Segment(90, 80), Segment((2, 4, 11), (4, 4, 8)), (1, 3, 5))),
    "256 tokens": Case((3, Segment((4, 5, 9), (4, 8, 8)), Segment(70, keys="compete")), 1),
    "several videos in one competition": Case((OTHER, 3, VIDEO, (5, 1, 3)), 3),
    "budgets of all kinds": Case(
        (
            replace(VIDEO, topk=(1, 0.5)),
            replace(OTHER, topk=vsa.TopP(0.6)),
            Segment((1, 3, 5), (1, 2, 2), topk=2),
        ),
        None,
    ),
    "mass": Case((OTHER, 5, VIDEO), vsa.TopP(0.7, floor=2)),
    "per head": Case((OTHER, VIDEO), (1, 0.5), kv_heads=2),
    "dense video, kept video": Case(
        (
            replace(VIDEO, queries="dense"),
            Segment((1, 3, 3), keys="kept"),
            Segment(40, 16, queries="sparse"),
        ),
        1,
    ),
    "other keys": Case(
        (5, VIDEO, (1, 3, 3)), 2, kv_segments=(9, OTHER, Segment(VIDEO.shape, topk=1))
    ),
    "everything": Case((OTHER, 5, VIDEO), 1.0),
    "no gates": Case((11, OTHER, VIDEO), gates=()),
    "both gates": Case((11, OTHER, TEXT, VIDEO), gates=("gate_coarse", "gate_fine")),
    "fine gate": Case((11, OTHER, VIDEO), gates=("gate_fine",)),
    "one token": Case((1, (1, 1, 1), (1, 1, 1))),
    "negative scale": Case((TEXT, OTHER, VIDEO), scale=-0.3),
    "one tile": Case(((1, 2, 3),), 1),
    "no video": Case((Segment(30, 9, keys="compete", queries="sparse"), 7)),
    "invalid text": Case((9, TEXT, 6, VIDEO), batch=2, text_valid=True),
    "invalid text, two videos": Case(
        (9, TEXT, OTHER, 6, VIDEO),
        batch=2,
        text_valid=True,
        gates=("gate_coarse", "gate_fine"),
    ),
    "invalid text that competes": Case(
        (
            Segment(40, 10, keys="compete", queries="sparse"),
            Segment(20, 16, keys="compete", queries="sparse"),
            VIDEO,
        ),
        3,
        batch=2,
        text_valid=True,
        scale=-0.2,
    ),
    "a kept image beside invalid text": Case(
        (9, Segment((1, 3, 3), keys="kept", queries="dense"), 6, VIDEO), text_valid=True
    ),
}
