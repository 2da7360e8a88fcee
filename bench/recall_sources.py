# SPDX-License-Identifier: Apache-2.0
"""Where bench/recall.py has queries, keys and values from: trained models, or recordings of them.

A recording is a .pt file that anybody can write: {"about": {...}, "grid": [T, H, W], "tile": [t, h,
w], "clips": [{layer name: {"q", "k", "v" and where there are gates "gate_coarse", "gate_fine"}}]}.
Tensors are (B, T*H*W, heads, head_dim), video tokens in raster order, after the rotary embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vsa
from vsa.training import checkpoints, flow, probes
from vsa.training.data import Batch, Data
from vsa.training.model import SIZES, VideoTransformer


@dataclass(frozen=True, eq=False)
class Layer:
    """What a layer's attention works on.

    Attributes:
        q: (B, S, heads, head_dim), after norm and rotary embedding.
        k: likewise, its heads dividing those of q.
        v: like k.
        gate_coarse: like q, or None.
        gate_fine: likewise.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gate_coarse: Tensor | None = None
    gate_fine: Tensor | None = None


Clip = dict[str, Layer]
"""Layers by name, in their order."""


@dataclass(frozen=True, eq=False)
class Source:
    """A model to be looked at.

    Attributes:
        name: what figures call it.
        grid: of all clips.
        calibration: clips that budgets may be found on.
        held_out: clips that figures are of.
        about: where it is from.
        trained: the model itself, where there is one.
    """

    name: str
    grid: vsa.Grid
    calibration: Iterable[Clip]
    held_out: Iterable[Clip]
    about: dict[str, Any]
    trained: Trained | None = None


@dataclass(frozen=True, eq=False)
class Trained:
    """A model whose loss can be measured.

    Attributes:
        model: of ``vsa train``.
        held_out: batches that figures are of.
        device: where both are.
    """

    model: VideoTransformer
    held_out: list[Batch]
    device: torch.device

    def autocast(self) -> torch.autocast:
        """What the model runs under."""
        return torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda")

    def sparse(self) -> VideoTransformer | None:
        """The same weights in layers that choose tiles; None for a kind whose layers cannot."""
        kind = "fine" if self.model.kind == "full" else self.model.kind
        if kind not in ("fine", "vsa", "ramp", "abrupt"):
            return None
        size = next(
            name
            for name, each in SIZES.items()
            if (each.dim, each.depth) == (self.model.patch_out.in_features, len(self.model.blocks))
        )
        found = VideoTransformer(size, kind, self.model.grid, 1.0)
        found.load_state_dict(self.model.state_dict())
        return found.to(self.device)

    @torch.no_grad()
    def loss(self, model: VideoTransformer) -> Tensor:
        """Held-out loss of every clip, (clips,) fp64 on the CPU."""
        with self.autocast():
            each = [flow.clip_losses(model, x.video, x.noise, x.time) for x in self.held_out]
        return torch.cat(each).double().cpu()


def open_source(
    path: Path, device: torch.device, clips: int, calibration: int, real: float | None
) -> Source:
    """A file of weights of ``vsa train``, or a recording.

    Args:
        path: the file.
        device: where it shall be computed.
        clips: held-out clips, filled up to whole batches.
        calibration: training clips.
        real: share of real clips; None for that of the training.

    Raises:
        ValueError: another file, or a recording of a single clip.
    """
    if _is_recording(path):
        return _recording(path, device, clips)
    model, settings = checkpoints.load_model(path, device)
    settings = replace(
        settings,
        clips=max(calibration, settings.batch),
        held_out=clips,
        real=settings.real if real is None else real,
    )
    data = Data(settings, device)
    batches = [data.batch(step) for step in range(-(-calibration // settings.batch))]
    about = {
        "weights": path.name,
        "kind": model.kind,
        "size": settings.size,
        "topk_trained": settings.topk,
        "real": settings.real,
        "clips": len(data.sources),
        "calibration_clips": len(batches) * settings.batch,
    }
    trained = Trained(model, data.held_out, device)
    return Source(
        f"{model.kind} {settings.size}",
        settings.video,
        _Captured(trained, batches),
        _Captured(trained, data.held_out),
        about,
        trained,
    )


@dataclass(frozen=True, eq=False)
class _Captured:
    """Clips that a model computes when they are asked for."""

    trained: Trained
    batches: list[Batch]

    def __iter__(self) -> Iterator[Clip]:
        for batch in self.batches:
            with self.trained.autocast():
                clip = captured(self.trained.model, batch)
            yield clip  # outside: what is measured is not rounded


@torch.no_grad()
def captured(model: VideoTransformer, batch: Batch) -> Clip:
    """Run a model of ``vsa train`` on a batch, and keep what its attention works on."""
    values: list[Tensor] = []

    def keep(_: object, __: object, projected: Tensor) -> None:
        values.append(projected.chunk(3, -1)[2])

    hooks = [block.attention.to_qkv.register_forward_hook(keep) for block in model.layers]
    try:
        with probes.watched(model) as found:
            model(torch.lerp(batch.video, batch.noise, batch.time[:, None, None]), batch.time)
    finally:
        for hook in hooks:
            hook.remove()
    clip = {}
    for number, (q, k) in enumerate(found["qk"]):
        gates = {name: found[name][number][0].view_as(q) for name in probes.GATES if name in found}
        clip[f"blocks.{number}.attention"] = Layer(q, k, values[number].view_as(k), **gates)
    return clip


def record(path: Path, source: Source) -> None:
    """Write a recording of a source's clips, those for calibration first."""
    clips = [
        {
            name: {
                field.name: value.cpu()
                for field in fields(layer)
                if (value := getattr(layer, field.name)) is not None
            }
            for name, layer in clip.items()
        }
        for part in (source.calibration, source.held_out)
        for clip in part
    ]
    grid = source.grid
    content = {"about": source.about, "grid": list(grid.shape), "tile": list(grid.tile)}
    torch.save(content | {"clips": clips}, path)


def _is_recording(path: Path) -> bool:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # what is wrong with it is said by whoever reads it next
        return False
    return isinstance(found, dict) and "clips" in found


def _recording(path: Path, device: torch.device, clips: int) -> Source:
    """The last clips are held out, those before calibrate."""
    found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    total = len(found["clips"])
    if total < 2:
        raise ValueError(
            f"{path} must hold two clips at least, one to calibrate on and one held out, but it "
            f"holds {total}"
        )
    held_out = min(clips, total // 2)
    grid = vsa.Grid(tuple(found["grid"]), tuple(found["tile"]))
    parts = found["clips"][:-held_out], found["clips"][-held_out:]
    calibration, rest = (_Recorded(part, device) for part in parts)
    about = {**found["about"], "clips": held_out, "calibration_clips": total - held_out}
    return Source(path.stem, grid, calibration, rest, about)


@dataclass(frozen=True, eq=False)
class _Recorded:
    """Clips of a file, one at a time on the device."""

    clips: list[dict[str, dict[str, Tensor]]]
    device: torch.device

    def __iter__(self) -> Iterator[Clip]:
        for clip in self.clips:
            yield {
                name: Layer(**{key: x.to(self.device) for key, x in tensors.items()})
                for name, tensors in clip.items()
            }
