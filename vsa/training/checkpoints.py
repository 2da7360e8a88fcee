# SPDX-License-Identifier: Apache-2.0
"""Files of a run: the whole of it, to go on from, and weights alone, to start from or look at."""

from __future__ import annotations

import os
import pickle
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from vsa.training.model import VideoTransformer
from vsa.training.run import Run
from vsa.training.settings import Settings

WHOLE = "checkpoint.pt"
"""Weights, moments and averages in fp32, and all rows: 12 to 16 bytes per weight and kind."""


def weights_name(kind: str) -> str:
    """The file of a kind's weights in the folder of its run."""
    return f"weights-{kind}.pt"


def save_whole(run: Run, folder: Path) -> None:
    """Write all that ``load_whole`` needs to go on as if nothing had happened."""
    _save({"settings": asdict(run.settings), **run.state()}, folder / WHOLE)


def load_whole(run: Run, folder: Path) -> None:
    """Go on where the run in a folder stopped.

    Raises:
        ValueError: no checkpoint there, or one of other settings, which are named.
    """
    found = _load(folder / WHOLE, ("settings", "step", "rows", "arms"))
    for name, value in asdict(run.settings).items():
        default = Settings.__dataclass_fields__[name].default
        if (before := found["settings"].get(name, default)) != value:
            raise ValueError(
                f"{name} must be {before} as in the run that is resumed, but it is {value}"
            )
    run.load(found)


def save_weights(run: Run, folder: Path) -> None:
    """Write each model in bf16, two bytes per weight; averaged weights where there are some."""
    for kind, arm in run.arms.items():
        with arm.averaged():
            weights = {name: x.bfloat16() for name, x in arm.model.state_dict().items()}
        content = {
            "settings": asdict(run.settings),
            "kind": kind,
            "step": run.step,
            "weights": weights,
        }
        _save(content, folder / weights_name(kind))


def load_model(path: Path, device: torch.device | str = "cpu") -> tuple[VideoTransformer, Settings]:
    """A model that was trained, in fp32.

    Args:
        path: a file of ``save_weights``.
        device: where it shall be.

    Returns:
        The model, and the settings of its run.

    Raises:
        ValueError: another file.
    """
    found = _load(path, ("settings", "kind", "weights"))
    known = {each.name for each in fields(Settings)}
    settings = Settings(**{k: v for k, v in found["settings"].items() if k in known})
    model = VideoTransformer(
        settings.size, found["kind"], settings.video, settings.topk, settings.seed
    )
    model.load_state_dict(found["weights"])
    return model.to(device), settings


def start_from(run: Run, source: Path) -> None:
    """Give the models weights that were trained before; their steps begin at 0.

    Args:
        run: one that has taken no step.
        source: a file of weights for every kind, or a folder that holds those of each kind. Gates
            that the file does not have stay as they start.

    Raises:
        ValueError: no such file, or weights of another size.
    """
    for kind, arm in run.arms.items():
        path = source / weights_name(kind) if source.is_dir() else source
        weights = _load(path, ("weights",))["weights"]
        own = arm.model.state_dict()
        if any(name in own and x.shape != own[name].shape for name, x in weights.items()):
            raise ValueError(f"start must hold weights of the size asked for, but {path} does not")
        missing = arm.model.load_state_dict(weights, strict=False).missing_keys
        if lacking := [name for name in missing if "to_gate" not in name]:
            raise ValueError(
                f"start must hold all weights but gates, but {path} lacks {lacking[0]}"
            )
        for average, parameter in zip(arm.average, arm.model.parameters(), strict=False):
            average.copy_(parameter.detach())


def _save(content: dict[str, Any], path: Path) -> None:
    """Whoever reads finds the old file or the new one, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        torch.save(content, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _load(path: Path, parts: tuple[str, ...]) -> dict[str, Any]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # whose sentence advises to run what the file says
        raise ValueError(
            f"{path} must be a file of vsa train, but holds something else than tensors and numbers"
        ) from None
    except (OSError, RuntimeError, EOFError) as error:
        said = str(error).splitlines()[0]
        raise ValueError(
            f"{path} must be a file of vsa train, but cannot be read: {said}"
        ) from None
    if not isinstance(found, dict) or any(part not in found for part in parts):
        raise ValueError(f"{path} must be a file of vsa train that holds {', '.join(parts)}")
    return found
