# SPDX-License-Identifier: Apache-2.0
"""One naming's checkpoint in the other's, or its gates alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vsa.integrations.checkpoints.files import Checkpoint, Held, whole_or_nothing, write_file
from vsa.integrations.checkpoints.names import MODELS, Naming, Reading, read, template

CONFIG = "config.json"


@dataclass(frozen=True)
class Conversion:
    """What is to be written, known to be whole before anything is.

    Attributes:
        checkpoint: where the tensors are.
        reading: whose they are, and in which naming.
        names: new names by old ones, of what is written.
        skipped: how many tensors are left out.
        into_one: whether one file is written in the place of shards.
    """

    checkpoint: Checkpoint
    reading: Reading
    names: dict[str, str]
    skipped: int = 0
    into_one: bool = False

    @property
    def bytes(self) -> int:
        """Of the tensors that are written."""
        held = self.checkpoint.tensors
        return sum(held[name].end - held[name].start for name in self.names)

    def rules(self) -> dict[tuple[str, str], int]:
        """Old and new name with N for a block's number, and how many there are of each."""
        found: dict[tuple[str, str], int] = {}
        for old, new in self.names.items():
            rule = template(old)[0], template(new)[0]
            found[rule] = found.get(rule, 0) + 1
        return found

    def write(self, destination: Path) -> None:
        """Write the file or folder, whole or not at all.

        Raises:
            ValueError: a destination that cannot be written.
            OSError: the disk's own.
        """
        folder = self.checkpoint.place.is_dir() and not self.into_one
        whole_or_nothing(destination, self._folder if folder else self._file, self.bytes)

    def _renamed(self, tensors: Mapping[str, Held]) -> dict[str, Held]:
        order = sorted(tensors.items(), key=lambda each: each[1].start)
        return {self.names[name]: held for name, held in order if name in self.names}

    def _file(self, path: Path) -> None:
        tensors: dict[str, Held] = {}
        for each in self.checkpoint.files.values():
            tensors |= self._renamed(each)
        write_file(path, tensors, next(iter(self.checkpoint.metadata.values())))

    def _folder(self, path: Path) -> None:
        path.mkdir()
        held = self.checkpoint
        for name, tensors in held.files.items():
            write_file(path / name, self._renamed(tensors), held.metadata[name])
        if held.index is not None:
            name, index = held.index
            mapped = {self.names[key]: shard for key, shard in index["weight_map"].items()}
            text = json.dumps({**index, "weight_map": dict(sorted(mapped.items()))}, indent=2)
            (path / name).write_text(text + "\n")
        if (config := held.place / CONFIG).is_file():
            shutil.copyfile(config, path / CONFIG)


def conversion(checkpoint: Checkpoint, to: Naming) -> Conversion:
    """The whole checkpoint in another naming.

    Raises:
        ValueError: unknown or missing names, or nothing to rename.
    """
    reading = read(checkpoint.tensors)
    names = reading.in_naming(to)
    if all(old == new for old, new in names.items()):
        raise ValueError(f"all {len(names)} names are those of {to} already: nothing is written")
    return Conversion(checkpoint, reading, names)


def gates_alone(checkpoint: Checkpoint) -> Conversion:
    """The gates out of a checkpoint or an adapter, under the names that both namings share.

    Raises:
        ValueError: none there, or those of some blocks only.
    """
    held = checkpoint.tensors
    known = {name for each in MODELS for pair in each.aliases.items() for name in pair}
    found = [name for name in held if template(name)[0] in known]
    if not found:
        raise ValueError(f"{checkpoint.place} holds no to_gate_compress of a model that is known")
    reading = read(found)
    return Conversion(
        checkpoint, reading, reading.in_naming("diffusers"), len(held) - len(found), True
    )
