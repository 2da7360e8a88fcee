# SPDX-License-Identifier: Apache-2.0
"""Coarse gates in checkpoints: their names, and where they lie."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

NAME = "to_gate_compress"
WEIGHTS = "*.safetensors", "diffusion_pytorch_model*.bin"
"""Files beside a model: all of the one kind, and what diffusers writes of the other."""

_ATTENTION = r"(?:(?:attn1?|(?:video_dec_block\.)?self_attention)\.)?"
_KEY = re.compile(rf"(?:.*?\.)??((?:\w+_)?blocks\.\d+)\.{_ATTENTION}{NAME}\.(.+)")


def gates_in(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gates among the weights of a checkpoint, by ``blocks.N.to_gate_compress.*``.

    Raises:
        ValueError: one of them is there under several names, with several values.
    """
    return _gathered((key, key, value) for key, value in state_dict.items())


def _gathered(weights: Iterable[tuple[str, str, Tensor]]) -> dict[str, Tensor]:
    """Gates by their names here, from (where it was found, its name there, weight)."""
    found: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for where, key, value in weights:
        if not (match := _KEY.fullmatch(key)):
            continue
        name = f"{match[1]}.{NAME}.{match[2]}"
        if name in found and not _same(found[name], value):
            raise ValueError(
                f"state_dict holds {name} twice with other values, in {origin[name]} and in "
                f"{where}, and which is this transformer's is not known: leave only one there"
            )
        if name not in found or found[name].element_size() < value.element_size():
            found[name], origin[name] = value, where
    return found


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether one is the other, maybe rounded, as variants of a checkpoint are."""
    narrow = min(one, other, key=Tensor.element_size).dtype
    return one.shape == other.shape and torch.equal(one.to(narrow), other.to(narrow))


def is_gate(key: str) -> bool:
    """Whether a checkpoint's weight of this name belongs to a gate."""
    return _KEY.fullmatch(key) is not None


def gates_at(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The gates in a safetensors file or a folder of them, on the CPU.

    Raises:
        ValueError: none there, or a file of another format.
    """
    where = Path(path)
    files = sorted(where.glob("*.safetensors")) if where.is_dir() else [where]
    found = _read(files)
    if not found:
        raise ValueError(
            f"state_dict is the path {path}, but none of its {len(files)} safetensors files holds "
            f"a {NAME}: pass what transformer.save_pretrained or save_file has written with gates"
        )
    return found


def gates_beside(transformer: Any) -> dict[str, Tensor]:
    """The gates in the local folder that a model was loaded from, which diffusers drops.

    Raises:
        ValueError: several of its folders hold some, or several files other ones.
    """
    origin = Path(getattr(transformer.config, "_name_or_path", None) or "")
    if not origin.name or not origin.is_dir():
        return {}
    folders = (origin, *filter(Path.is_dir, origin.iterdir()))
    found = {
        each.name: _read(sorted(path for pattern in WEIGHTS for path in each.glob(pattern)))
        for each in folders
    }
    having = sorted(name for name, gates in found.items() if gates)
    if len(having) > 1:
        raise ValueError(
            f"gates lie in {' and '.join(having)} of {origin}, and which are this transformer's is "
            "not known: load it from one of these folders itself, without subfolder="
        )
    return found[having[0]] if having else {}


def _read(files: Iterable[Path]) -> dict[str, Tensor]:
    return _gathered((str(file), *weight) for file in files for weight in _gates_of(file))


def _gates_of(file: Path) -> Iterator[tuple[str, Tensor]]:
    """The gates of a file, as it names them."""
    try:
        if file.suffix == ".bin":
            # Of an older PyTorch such a file is no archive, and is read whole.
            held = torch.load(file, "cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
            yield from ((key, held[key]) for key in filter(is_gate, held))
            return
        with safe_open(file, framework="pt") as weights:
            yield from ((key, weights.get_tensor(key)) for key in filter(is_gate, weights.keys()))
    except Exception as error:  # what is no pickle can fail in any way
        kind = "PyTorch" if file.suffix == ".bin" else "safetensors"
        raise ValueError(
            f"state_dict would come from {file}, which cannot be read as a {kind} file: {error}"
        ) from None
