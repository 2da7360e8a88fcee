# SPDX-License-Identifier: Apache-2.0
"""Safetensors files, read by their headers and written by copying bytes: no tensor is loaded."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

MOST_HEADER = 100_000_000
"""Bytes of a header, beyond which the format's own library reads no file."""
INDEX = ".index.json"


class Held(NamedTuple):
    """Where a tensor's bytes are.

    Attributes:
        file: that holds them.
        dtype: as the format writes it.
        shape: likewise.
        start: its first byte, from the beginning of the file.
        end: the byte after its last.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Checkpoint:
    """One file, or the shards in a folder.

    Attributes:
        place: the file or folder.
        files: tensors by name, for every file by its name.
        metadata: that the files' headers hold.
        index: the name and the content of the index of shards, if there is one.
    """

    place: Path
    files: dict[str, dict[str, Held]]
    metadata: dict[str, dict[str, str]]
    index: tuple[str, dict[str, Any]] | None = None

    @property
    def tensors(self) -> dict[str, Held]:
        """All of them, by name."""
        return {name: held for each in self.files.values() for name, held in each.items()}


def open_checkpoint(place: Path) -> Checkpoint:
    """Read the headers of a safetensors file, or of a folder's.

    Raises:
        ValueError: no such file or folder, or one that is damaged.
    """
    if not place.is_dir():
        tensors, metadata = _header(place)
        return Checkpoint(place, {place.name: tensors}, {place.name: metadata})
    indices = sorted(place.glob(f"*.safetensors{INDEX}"))
    singles = sorted(place.glob("*.safetensors"))
    if len(indices) > 1 or (not indices and len(singles) != 1):
        hint = f": give {place / 'transformer'}" if (place / "transformer").is_dir() else ""
        raise ValueError(
            f"a folder must hold one safetensors file or one index of shards, but {place} holds "
            f"{len(singles)} files and {len(indices)} indices{hint}"
        )
    if not indices:
        found = open_checkpoint(singles[0])
        return Checkpoint(place, found.files, found.metadata)
    index = _index(indices[0])
    shards = sorted(set(index["weight_map"].values()))
    read = {name: _header(place / name) for name in shards}
    found = Checkpoint(
        place,
        {name: tensors for name, (tensors, _) in read.items()},
        {name: metadata for name, (_, metadata) in read.items()},
        (indices[0].name, index),
    )
    said = index["weight_map"].items()
    true = {(key, name) for name, tensors in found.files.items() for key in tensors}
    if differing := sorted(true ^ set(said)):
        key, name = differing[0]
        raise ValueError(f"{indices[0]} and its shards disagree about {key} in {name}")
    return found


def _index(file: Path) -> dict[str, Any]:
    try:
        index = json.loads(file.read_text())
        shards = index["weight_map"].values()
        plain = all(isinstance(each, str) and Path(each).name == each for each in shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read as an index of shards: {error}") from None
    if not plain:
        raise ValueError(f"{file} names a shard outside of its own folder")
    return index


def _header(file: Path) -> tuple[dict[str, Held], dict[str, str]]:
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > min(MOST_HEADER, size - 8):
                raise ValueError(f"its header would have {length} bytes")
            header = json.loads(opened.read(length))
        metadata = header.pop("__metadata__", {})
        tensors = {name: _held(file, length, **entry) for name, entry in header.items()}
    except (OSError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"{file} cannot be read as a safetensors file: {error}") from None
    end = 8 + length
    for name, held in sorted(tensors.items(), key=lambda each: each[1].start):
        if held.start != end or held.end < held.start:
            raise ValueError(f"{file} is damaged: the bytes of {name} are not where others end")
        end = held.end
    if end != size:
        raise ValueError(f"{file} is damaged: it has {size} bytes, but its header says {end}")
    return tensors, metadata


def _held(file: Path, length: int, dtype: str, shape: list[int], data_offsets: list[int]) -> Held:
    start, end = (8 + length + int(each) for each in data_offsets)
    return Held(file, dtype, tuple(shape), start, end)


def write_file(path: Path, tensors: Mapping[str, Held], metadata: Mapping[str, str]) -> None:
    """Write tensors under new names, in the order in which they are given."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, held in tensors.items():
        size = held.end - held.start
        header[name] = {
            "dtype": held.dtype,
            "shape": list(held.shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (math.ceil(len(text) / 8) * 8 - len(text))  # tensors begin at a multiple of 8
    with path.open("xb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for held in tensors.values():
            with held.file.open("rb") as source:
                source.seek(held.start)
                _copy(source, out, held.end - held.start)


def _copy(source: Any, out: Any, size: int) -> None:
    while size:
        piece = source.read(min(size, 1 << 24))
        if not piece:
            raise ValueError(f"{source.name} became shorter while it was read")
        out.write(piece)
        size -= len(piece)


def whole_or_nothing(destination: Path, write: Callable[[Path], None], size: int) -> None:
    """Let ``write`` make a file or folder beside its place, and move it there once it is whole.

    Args:
        destination: where it goes; must not exist.
        write: is given the path to write to.
        size: bytes that this will take.

    Raises:
        ValueError: a place that is taken or missing, or has too little room.
    """
    parent = destination.absolute().parent
    if destination.exists() or not parent.is_dir():
        what = "exists already" if destination.exists() else f"would lie in {parent}, which is none"
        raise ValueError(f"a new path in a folder that exists is needed, but {destination} {what}")
    free = shutil.disk_usage(parent).free
    if free < size:
        raise ValueError(
            f"{destination} will take {size / 2**30:.1f} GiB, but {parent} has {free / 2**30:.1f} "
            "GiB left"
        )
    room = parent / f".{destination.name}.unfinished-{os.getpid()}"
    try:
        room.mkdir()
        write(room / destination.name)
        os.rename(room / destination.name, destination)
    finally:
        shutil.rmtree(room, ignore_errors=True)
