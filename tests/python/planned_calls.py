# SPDX-License-Identifier: Apache-2.0
"""Calls of attention that tests run with and without plans."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import vsa
from vsa.stages import eager
from vsa.values.remembered import Remembered

pytest.importorskip("vsa._C", reason="vsa was built without its compiled part")

VIDEO, FLAT = (1, 4, 5, 6, 2, 64), (1, 120, 2, 64)
GRIDS = {FLAT: (4, 5, 6)}


class Call(NamedTuple):
    """A call of attention, from which its tensors follow."""

    shape: tuple[int, ...] = VIDEO
    kv_heads: int = 2
    dtype: torch.dtype = torch.bfloat16
    strides: str = "contiguous"
    gates: tuple[str | None, str | None] = (None, None)
    topk: Any = 2
    scale: Any = None
    tile: Any = (4, 4, 4)
    grid: Any = None
    wants: str = ""  # which of q, k, v, f (fine gate) and c (coarse gate) want a gradient
    upstream: str = "out"
    autocast: Any = False  # or a type, True for that of the tensors
    score: Any = "mean"
    text: tuple[int, int] = (0, 0)  # tokens before and after the video
    valid: str | None = None  # how the mask of text is made
    given: str | None = None  # how the bitmap of a given selection lies
    tail: Any = False

    @property
    def extent(self) -> Any:
        """The grid that is passed."""
        video = self.shape[1:4] if len(self.shape) == 6 else (4, 5, 6)
        if self.text != (0, 0):
            return vsa.Grid(video, self.tile, *self.text)
        return self.grid or GRIDS.get(self.shape)

    @property
    def of_queries(self) -> tuple[int, ...]:
        """The shape of q: with text it is flat."""
        if self.text == (0, 0):
            return self.shape
        return (self.shape[0], self.extent.length, *self.shape[-2:])

    def mask(self) -> Tensor | None:
        """Which text is valid."""
        shape = self.shape[0], sum(self.text)
        mask = torch.arange(shape[0] * shape[1]).view(shape) % 3 > 0
        if self.valid == "expanded":
            return mask[:1].expand(shape)
        if self.valid == "expanded in inference":
            with torch.inference_mode():
                return mask[:1].clone().expand(shape)
        if self.valid == "a column of more":
            return torch.stack((mask, ~mask), -1)[..., 0]
        return {"some": mask, "none": mask & False, "all": mask | True}.get(str(self.valid))

    def selection(self, q: Tensor, k: Tensor) -> vsa.Selection | None:
        """One that is given."""
        if self.given is None:
            return None
        with torch.no_grad():
            x = q.detach().contiguous(), k.detach().contiguous()
            found = vsa.select(*x, 2, grid=self.extent, tile=self.tile, backend="torch")
        bitmap = found.bitmap
        if self.given == "heads outside":
            bitmap = bitmap.transpose(1, 2).contiguous().transpose(1, 2)
        if self.given == "odd address":
            bitmap = strided(bitmap, "odd address")
        if self.given == "expanded":
            bitmap = bitmap[:, :1].expand(bitmap.shape)
        if self.given == "expanded in inference":
            with torch.inference_mode():
                bitmap = bitmap[:, :1].clone().expand(bitmap.shape)
        return dataclasses.replace(found, bitmap=bitmap)

    def tensors(self) -> list[Tensor | None]:
        generator = torch.Generator().manual_seed(len(self.shape) + self.kv_heads)
        of_keys = (*self.of_queries[:-2], self.kv_heads, self.shape[-1])
        shapes = self.of_queries, of_keys, of_keys
        numbers = [torch.randn(shape, generator=generator) for shape in shapes]
        found = [strided(x.to(self.dtype), self.strides) for x in numbers]
        for kind in self.gates:
            gate = torch.randn(self.of_queries, generator=generator)
            found.append(None if kind is None else shaped_gate(gate, kind, self.dtype))
        names = zip("qkvfc", found, strict=True)
        return [x if x is None else x.requires_grad_(name in self.wants) for name, x in names]

    def run(self) -> list[Tensor | None]:
        """Output, log-sum-exp, bitmap, and gradients."""
        tensors = self.tensors()
        q, k, v, gate_fine, gate_coarse = tensors
        options = {"gate_fine": gate_fine, "gate_coarse": gate_coarse, "tile": self.tile}
        options |= {"grid": self.extent, "scale": self.scale, "score": self.score}
        options |= {"text_valid": self.mask(), "selection": self.selection(q, k)}
        options |= {"tail": self.tail}
        to = self.autocast if isinstance(self.autocast, torch.dtype) else self.dtype
        with torch.autocast("cpu", to, enabled=self.autocast is not False):
            out, selection, lse = vsa.attention(
                q,
                k,
                v,
                None if self.given else self.topk,
                **options,
                return_lse=True,
                return_selection=True,
                backend="emulated",
            )
        wanting = [x for x in tensors if x is not None and x.requires_grad]
        grads: tuple[Tensor | None, ...] = ()
        if wanting:
            results = {"out": (out,), "lse": (lse,)}.get(self.upstream, (out, lse))
            upstream = [upstream_of(x, self.upstream) for x in results]
            grads = torch.autograd.grad(results, wanting, upstream, allow_unused=True)
        return [out, lse, selection.bitmap, *grads]


def strided(x: Tensor, kind: str) -> Tensor:
    if kind == "heads outside":
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if kind == "odd address":
        return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)
    if kind == "axes exchanged" and x.ndim == 6:  # which do not fold into one
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "tokens of 136 bytes":  # which no tensor map describes
        return torch.cat((x, x[..., :4]), -1)[..., :-4]
    if kind == "part":  # as of a fused projection to q, k and v
        return torch.cat((x, x), -2)[..., : x.shape[-2], :]
    return x


def shaped_gate(x: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    if kind == "broadcast":
        return x[:, :1, ..., :1].contiguous()
    if kind == "expanded":
        return x[..., :1].to(dtype).expand(x.shape)
    if kind == "channels outside":
        return x.to(dtype).movedim(-1, 1).contiguous().movedim(1, -1)
    if kind == "fp32":
        return x
    return strided(x.to(dtype), kind)


def upstream_of(x: Tensor, kind: str) -> Tensor:
    numbers = torch.linspace(-1, 1, x.numel()).view(x.shape).to(x.dtype)
    if kind == "expanded":
        return numbers.flatten()[-1].expand(x.shape)
    if kind == "transposed":
        return numbers.mT.contiguous().mT
    return strided(numbers, kind)


def outcome(run: Callable[[], Any]) -> Any:
    """Everything that a user can tell of a call."""
    try:
        found = run()
    except Exception as error:
        # Autograd's sentence about changes in place speaks of the flat shape or the user's.
        return type(error), str(error).split("[CPU")[0]
    return [
        x
        if not isinstance(x, Tensor)
        else (
            x.shape,
            x.stride(),
            x.dtype,
            x.requires_grad,
            x.is_inference(),
            x.detach().contiguous().view(torch.uint8).numpy().tobytes(),
        )
        for x in found
    ]


def unplanned(run: Callable[[], Any]) -> Any:
    with eager.paused():
        return outcome(run)


def without_plans(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Forget all plans; the list that is returned grows with each call that runs by one."""
    counted, attend = [], eager.attend

    def counting(*args: Any) -> Any:
        counted.append(1)
        return attend(*args)

    monkeypatch.setattr(eager, "attend", counting)
    monkeypatch.setattr(eager, "_plans", Remembered(256))
    return counted


attention = partial(vsa.attention, topk=2, backend="emulated")
BASE = Call()
GATED = Call(gates=("contiguous", "contiguous"))
TRAINED = Call(wants="qkv")


OF_A_FRESH_PROCESS = (
    BASE,
    Call(gates=("contiguous", "fp32"), wants="qkvfc"),
    Call(FLAT, kv_heads=1, topk=vsa.TopP(0.5), wants="k", upstream="both"),
    Call(gates=(None, "contiguous"), score=vsa.SubBlocks(4), wants="qkvc"),
)


def digest(call: Call) -> str:
    return hashlib.sha256(repr(outcome(call.run)).encode()).hexdigest()


ALL = GATED._replace(wants="qkvfc")


def given(call: Call = ALL) -> dict[str, Any]:
    names = "q", "k", "v", "gate_fine", "gate_coarse"
    return dict(zip(names, call.tensors(), strict=True))


def slopes(out: Tensor, tensors: dict[str, Any], upstream: Tensor | None = None) -> list[Any]:
    upstream = torch.ones_like(out) if upstream is None else upstream
    wanting = [x for x in tensors.values() if x is not None and x.requires_grad]
    return [out, *torch.autograd.grad(out, wanting, upstream)]


def same_by_a_plan(run: Callable[[], Any], ran: list[int]) -> None:
    """The outcome with a plan made before is that without."""
    expected = unplanned(run)
    outcome(run)
    ran.clear()
    assert outcome(run) == expected
    assert ran, "no plan ran"
