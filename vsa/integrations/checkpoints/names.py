# SPDX-License-Identifier: Apache-2.0
"""What diffusers and FastVideo call the same parameters, and which of them a model has.

Facts are those of diffusers 0.42.1's classes and of fastvideo 0.2.1's configurations
(``param_names_mapping``). Every difference is one of names: no tensor is cut, joined or turned.
``N`` stands for a block's number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

Naming = Literal["diffusers", "fastvideo"]
NAMINGS: tuple[Naming, ...] = get_args(Naming)
TITLES: dict[Naming, str] = {"diffusers": "diffusers'", "fastvideo": "FastVideo's own"}

Row = tuple[str, str, tuple[str, ...]]
"""A module in diffusers' naming, in FastVideo's ("" where it is the same), and its parameters."""

_BLOCK = re.compile(r"(blocks\.)(\d+)(?=\.)")
_BOTH, _WEIGHT, _ITSELF = ("weight", "bias"), ("weight",), ("",)


@dataclass(frozen=True)
class Model:
    """A transformer's parameters in both namings.

    Attributes:
        title: for messages.
        always: what every checkpoint has.
        together: what it has all of or nothing of, each with a title.
        maybe: what it may have, block by block.
        gates: the learned gates of the coarse branch, of all blocks or of none.
        aliases: names in which gates are found too, by the name that is written.
    """

    title: str
    always: tuple[Row, ...]
    together: Mapping[str, tuple[Row, ...]]
    maybe: tuple[Row, ...]
    gates: tuple[Row, ...]
    aliases: Mapping[str, str]
    of: Mapping[Naming, dict[str, str]] = field(init=False)

    def __post_init__(self) -> None:
        rows = [*self.always, *sum(self.together.values(), ()), *self.maybe, *self.gates]
        named: dict[Naming, dict[str, str]] = {"diffusers": {}, "fastvideo": {}}
        for row in rows:
            for theirs, own in zip(
                _names(row), _names((row[1] or row[0], "", row[2])), strict=True
            ):
                named["diffusers"][theirs] = theirs
                named["fastvideo"][own] = theirs
        for each in named.values():
            each.update(self.aliases)
        object.__setattr__(self, "of", named)

    def is_gate(self, template: str) -> bool:
        """Whether a name of diffusers' naming belongs to a gate."""
        return template in {name for row in self.gates for name in _names(row)}


def _names(row: Row) -> list[str]:
    return [f"{row[0]}.{each}" if each else row[0] for each in row[2]]


def template(name: str) -> tuple[str, int | None]:
    """A parameter's name with N for its block's number, and that number."""
    match = _BLOCK.search(name)
    if match is None:
        return name, None
    return f"{name[: match.end(1)]}N{name[match.end(2) :]}", int(match[2])


def _same(modules: str, parameters: tuple[str, ...], prefix: str = "") -> tuple[Row, ...]:
    return tuple((prefix + module, "", parameters) for module in modules.split())


_EMBED, _B = "condition_embedder.", "blocks.N."
WAN = Model(
    title="Wan",
    always=(
        ("patch_embedding", "patch_embedding.proj", _BOTH),
        (f"{_EMBED}time_embedder.linear_1", f"{_EMBED}time_embedder.mlp.fc_in", _BOTH),
        (f"{_EMBED}time_embedder.linear_2", f"{_EMBED}time_embedder.mlp.fc_out", _BOTH),
        (f"{_EMBED}time_proj", f"{_EMBED}time_modulation.linear", _BOTH),
        (f"{_EMBED}text_embedder.linear_1", f"{_EMBED}text_embedder.fc_in", _BOTH),
        (f"{_EMBED}text_embedder.linear_2", f"{_EMBED}text_embedder.fc_out", _BOTH),
        *_same("scale_shift_table", _ITSELF),
        *_same("proj_out", _BOTH),
        *((f"{_B}attn1.to_{x}", f"{_B}to_{x}", _BOTH) for x in "qkv"),
        (f"{_B}attn1.to_out.0", f"{_B}to_out", _BOTH),
        *((f"{_B}attn1.norm_{x}", f"{_B}norm_{x}", _WEIGHT) for x in "qk"),
        *_same("to_q to_k to_v", _BOTH, f"{_B}attn2."),
        (f"{_B}attn2.to_out.0", f"{_B}attn2.to_out", _BOTH),
        *_same("norm_q norm_k", _WEIGHT, f"{_B}attn2."),
        (f"{_B}norm2", f"{_B}self_attn_residual_norm.norm", _BOTH),
        (f"{_B}ffn.net.0.proj", f"{_B}ffn.fc_in", _BOTH),
        (f"{_B}ffn.net.2", f"{_B}ffn.fc_out", _BOTH),
        *_same("scale_shift_table", _ITSELF, _B),
    ),
    together={
        "image to video": (
            *_same("norm1 norm2", _BOTH, f"{_EMBED}image_embedder."),
            (
                f"{_EMBED}image_embedder.ff.net.0.proj",
                f"{_EMBED}image_embedder.ff.fc_in",
                _BOTH,
            ),
            (f"{_EMBED}image_embedder.ff.net.2", f"{_EMBED}image_embedder.ff.fc_out", _BOTH),
            *_same("add_k_proj add_v_proj", _BOTH, f"{_B}attn2."),
            *_same("norm_added_k", _WEIGHT, f"{_B}attn2."),
        )
    },
    # Published with image-to-video models and used by nobody: diffusers passes it over.
    maybe=_same("norm_added_q", _WEIGHT, f"{_B}attn2."),
    # Outside of attn1 in both: FastVideo's mapping leaves the name alone when it saves.
    gates=_same("to_gate_compress", _BOTH, _B),
    aliases={
        f"{_B}attn1.to_gate_compress.{x}": f"{_B}to_gate_compress.{x}" for x in ("weight", "bias")
    },
)

_R, _T = "token_refiner.refiner_blocks.N.", "transformer_blocks.N."
H3 = Model(
    title="MiniMax-H3",
    always=(
        *_same("proj_in audio_proj_in context_embedder proj_out audio_proj_out", _BOTH),
        ("time_embedder.linear_1", "time_embedder.fc_in", _BOTH),
        ("time_embedder.linear_2", "time_embedder.fc_out", _BOTH),
        *_same("token_refiner.final_norm norm_out.norm", _WEIGHT),
        *_same("norm_out.linear", _BOTH),
        *(
            row
            for block in (_R, _T)
            for row in (
                *_same("norm1 norm2 attn.to_q attn.to_k attn.to_v", _WEIGHT, block),
                *_same("attn.norm_q attn.norm_k", _WEIGHT, block),
                (f"{block}attn.to_out.0", f"{block}attn.to_out", _WEIGHT),
                (f"{block}ff.net.0.proj", f"{block}ff.fc_in", _WEIGHT),
                (f"{block}ff.net.2", f"{block}ff.fc_out", _WEIGHT),
            )
        ),
        *_same("adaln_proj.linear", _BOTH, _T),
    ),
    together={},
    maybe=(),
    gates=_same("attn.to_gate_compress", _WEIGHT, _T),
    # As adapters hold a whole parameter, and as repackaged files call the blocks.
    aliases={
        f"{block}attn.to_gate_compress.{x}": f"{_T}attn.to_gate_compress.weight"
        for block, x in ((_T, "set_weight"), (_B, "weight"), (_B, "set_weight"))
    },
)

MODELS = (WAN, H3)


@dataclass(frozen=True)
class Reading:
    """Names of a checkpoint, understood.

    Attributes:
        model: whose they are.
        naming: in which they are; where they are the same in both, diffusers'.
        canonical: every name of the checkpoint to diffusers' own.
    """

    model: Model
    naming: Naming
    canonical: dict[str, str]

    @property
    def gates(self) -> list[str]:
        """The checkpoint's names of gates."""
        return [
            name for name, own in self.canonical.items() if self.model.is_gate(template(own)[0])
        ]

    def in_naming(self, to: Naming) -> dict[str, str]:
        """Every name of the checkpoint to its name in a naming."""
        back: dict[str, str] = {}
        for name, theirs in self.model.of[to].items():
            back.setdefault(theirs, name)  # aliases stand last
        return {name: _filled(back[template(own)[0]], own) for name, own in self.canonical.items()}


def _filled(pattern: str, name: str) -> str:
    number = template(name)[1]
    return pattern if number is None else pattern.replace(".N.", f".{number}.")


def diffusers_name(model: Model, name: str) -> str:
    """A parameter's name in diffusers' naming; any other name as it is."""
    theirs = model.of["fastvideo"].get(template(name)[0])
    return name if theirs is None else _filled(theirs, name)


def read(names: Iterable[str]) -> Reading:
    """Whose names these are.

    Raises:
        ValueError: names that are unknown, of both namings at once, twice the same, or missing.
    """
    given = list(names)
    candidates = [(model, naming) for model in MODELS for naming in NAMINGS]
    model, naming = max(
        candidates, key=lambda each: sum(template(name)[0] in each[0].of[each[1]] for name in given)
    )
    known = model.of[naming]
    unknown = [name for name in given if template(name)[0] not in known]
    if unknown:
        raise ValueError(_about_unknown(model, naming, unknown, len(given)))
    canonical = {name: _filled(known[template(name)[0]], name) for name in given}
    if len(set(canonical.values())) < len(canonical):
        first: dict[str, str] = {}
        for name, own in canonical.items():
            if (other := first.setdefault(own, name)) != name:
                raise ValueError(f"{other} and {name} are the same parameter of {model.title}")
    found = Reading(model, naming, canonical)
    _check_complete(found)
    return found


def _about_unknown(model: Model, naming: Naming, unknown: list[str], count: int) -> str:
    other = next(each for each in NAMINGS if each != naming)
    some = ", ".join(sorted(unknown)[:2]) + f" and {len(unknown) - 2} more" * (len(unknown) > 2)
    if len(unknown) == count:
        why = f"none of which is a name of {' or '.join(each.title for each in MODELS)}"
    elif all(template(name)[0] in model.of[other] for name in unknown):
        why = f"which mixes {TITLES[other]} naming into {TITLES[naming]}"
    elif any("lora_" in name or name.endswith((".diff", ".diff_b")) for name in unknown):
        why = "which makes it an adapter: merge it into its model, or take its gates alone"
    else:
        why = f"which {TITLES[naming]} naming of {model.title} has no place for"
    return f"the checkpoint holds {some}, {why}"


def _check_complete(found: Reading) -> None:
    """Nothing of what is always there, or there together, may be missing."""
    held: dict[str, set[int | None]] = {}
    for own in found.canonical.values():
        pattern, number = template(own)
        held.setdefault(pattern, set()).add(number)
    model = found.model
    gates = [name for row in model.gates for name in _names(row)]
    alone = set(held) <= set(gates)
    groups = {"": model.always} if not alone else {}
    groups |= {title: rows for title, rows in model.together.items() if not alone}
    groups["gates"] = model.gates
    blocks: dict[str, int] = {}
    for pattern, numbers in held.items():
        stack = pattern.split("N.")[0]
        blocks[stack] = max(blocks.get(stack, 0), *(1 + (n or 0) for n in numbers))
    for title, rows in groups.items():
        patterns = [name for row in rows for name in _names(row)]
        if title and not any(pattern in held for pattern in patterns):
            continue
        for pattern in patterns:
            stack = pattern.split("N.")[0]
            wanted = set(range(blocks.get(stack, 1))) if "N." in pattern else {None}
            if lacks := sorted(wanted - held.get(pattern, set()), key=lambda n: n or 0):
                name = pattern.replace(".N.", f".{lacks[0]}.")
                said = f", as its {title} parts are there" if title else ""
                raise ValueError(f"the checkpoint of {model.title} lacks {name}{said}")
