# SPDX-License-Identifier: Apache-2.0
"""Coarse gates in checkpoints: their names, and where they lie."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

NAME = "to_gate_compress"
_ATTENTION = r"(?:(?:attn1?|(?:video_dec_block\.)?self_attention)\.)?"
_KEY = re.compile(rf"(?:.*?\.)??((?:\w+_)?blocks\.\d+)\.{_ATTENTION}{NAME}\.(.+)")


def gates_in(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gates among the weights of a checkpoint, by ``blocks.N.to_gate_compress.*``."""
    return {
        f"{match[1]}.{NAME}.{match[2]}": value
        for key, value in state_dict.items()
        if (match := _KEY.fullmatch(key))
    }


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
        ValueError: several of its folders hold some.
    """
    origin = Path(getattr(transformer.config, "_name_or_path", None) or "")
    if not origin.name or not origin.is_dir():
        return {}
    folders = (origin, *filter(Path.is_dir, origin.iterdir()))
    found = {each.name: _read(each.glob("*.safetensors")) for each in folders}
    having = sorted(name for name, gates in found.items() if gates)
    if len(having) > 1:
        raise ValueError(
            f"gates lie in {' and '.join(having)} of {origin}, and which are this transformer's is "
            "not known: load it from one of these folders itself, without subfolder="
        )
    return found[having[0]] if having else {}


def _read(files: Iterable[Path]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as held:
                found |= {key: held.get_tensor(key) for key in filter(is_gate, held.keys())}
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"state_dict would come from {file}, which cannot be read as a safetensors file: "
                f"{error}"
            ) from None
    return found
