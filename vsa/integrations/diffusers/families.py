# SPDX-License-Identifier: Apache-2.0
"""Which transformers are supported: their layers, and the grid that their input has."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
from torch import nn

from vsa.integrations.diffusers import processors as own
from vsa.integrations.diffusers.coordinates import Layout, layout_of

Call = Mapping[str, Any]
"""The arguments of the transformer's forward, by name."""


@dataclass(frozen=True)
class Family:
    """What apply_vsa has to know of one transformer class.

    Attributes:
        transformer: its name in diffusers.
        blocks: attributes that hold the blocks, in the order in which they run.
        attention: the attribute of a block that is self-attention.
        processor: our processor.
        replaces: the name of diffusers' processor that ours stands in for.
        layout: of the video tokens, from the configuration and the arguments of forward.
        rising: whether timesteps rise while a video is denoised.
    """

    transformer: str
    blocks: tuple[str, ...]
    attention: str
    processor: type[own.SparseProcessor]
    replaces: str
    layout: Callable[[Any, Call], Layout]
    rising: bool = False

    def layers(self, transformer: nn.Module) -> dict[str, nn.Module]:
        """The self-attention modules by the path of their block, in the order they run."""
        return {
            f"{name}.{index}": getattr(block, self.attention)
            for name in self.blocks
            for index, block in enumerate(getattr(transformer, name))
        }


def _wan(config: Any, call: Call) -> Layout:
    _, _, T, H, W = call["hidden_states"].shape
    t, h, w = config.patch_size
    return Layout((T // t, H // h, W // w))


def _ltx(config: Any, call: Call) -> Layout:
    tokens = call["hidden_states"].shape[1]
    given = call.get("num_frames"), call.get("height"), call.get("width")
    known = None not in given
    coordinates = call.get("video_coords")
    # Beside coordinates diffusers reads no extents, and pipelines pass ones.
    if coordinates is not None and not (known and math.prod(given) == tokens):  # type: ignore[arg-type]
        return layout_of(coordinates, tokens)
    if not known:
        raise ValueError(
            f"num_frames, height and width are {given}, but LTX packs its video, so that VSA needs "
            "all three, or video_coords: pass them to the transformer"
        )
    return Layout(given)  # type: ignore[arg-type]


def _hunyuan(config: Any, call: Call) -> Layout:
    _, _, T, H, W = call["hidden_states"].shape
    return Layout((T // config.patch_size_t, H // config.patch_size, W // config.patch_size))


def _cogvideox(config: Any, call: Call) -> Layout:
    _, T, _, H, W = call["hidden_states"].shape
    # CogVideoX 1.5 pads to whole patches in time; 1.0 has none.
    T = -(-T // (config.patch_size_t or 1))
    return Layout((T, H // config.patch_size, W // config.patch_size))


def _mochi(config: Any, call: Call) -> Layout:
    _, _, T, H, W = call["hidden_states"].shape
    return Layout((T, H // config.patch_size, W // config.patch_size))


_STREAMS = ("transformer_blocks",)
FAMILIES = (
    Family(
        "WanTransformer3DModel",
        ("blocks",),
        "attn1",
        own.WanSparseProcessor,
        "WanAttnProcessor",
        _wan,
    ),
    Family(
        "LTXVideoTransformer3DModel",
        _STREAMS,
        "attn1",
        own.LTXSparseProcessor,
        "LTXVideoAttnProcessor",
        _ltx,
    ),
    Family(
        "HunyuanVideoTransformer3DModel",
        (*_STREAMS, "single_transformer_blocks"),
        "attn",
        own.HunyuanVideoSparseProcessor,
        "HunyuanVideoAttnProcessor2_0",
        _hunyuan,
    ),
    Family(
        "HunyuanVideo15Transformer3DModel",
        _STREAMS,
        "attn",
        own.HunyuanVideo15SparseProcessor,
        "HunyuanVideo15AttnProcessor2_0",
        _hunyuan,
    ),
    Family(
        "CogVideoXTransformer3DModel",
        _STREAMS,
        "attn1",
        own.CogVideoXSparseProcessor,
        "CogVideoXAttnProcessor2_0",
        _cogvideox,
    ),
    Family(
        "MochiTransformer3DModel",
        _STREAMS,
        "attn1",
        own.MochiSparseProcessor,
        "MochiAttnProcessor2_0",
        _mochi,
        rising=True,
    ),
)


def family_of(transformer: object) -> Family:
    """The family of a transformer.

    Raises:
        TypeError: a class that is not supported.
    """
    for family in FAMILIES:
        known = getattr(diffusers, family.transformer, None)
        if known is not None and isinstance(transformer, known):
            return family
    # Pipelines are what people pass by mistake.
    hint = ": pass its .transformer" if hasattr(transformer, "transformer") else ""
    raise TypeError(
        f"transformer must be one of {', '.join(family.transformer for family in FAMILIES)}, "
        f"but it is a {type(transformer).__name__}{hint}"
    )
