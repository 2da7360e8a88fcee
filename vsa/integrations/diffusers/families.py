# SPDX-License-Identifier: Apache-2.0
"""Which transformers are supported: their layers, and the grid that their input has."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

import diffusers
from torch import nn

from vsa.integrations.diffusers import joint_processors as joint
from vsa.integrations.diffusers import processors as own
from vsa.integrations.diffusers import video_processors as video
from vsa.integrations.diffusers.coordinates import (
    Call,
    Layout,
    layout_of,
    layout_with_appended,
)
from vsa.integrations.diffusers.minimax_h3 import MiniMaxH3SparseProcessor, layout_of_packed
from vsa.integrations.diffusers.not_taken import why_not
from vsa.values.masks import ChunkCausal


@dataclass(frozen=True)
class Family:
    """What apply_vsa has to know of one transformer class.

    Attributes:
        transformer: its name in diffusers.
        blocks: attributes that hold the blocks, in the order in which they run.
        attention: the attribute of a block that is self-attention, or of one inside of it.
        processor: our processor.
        replaces: the names of diffusers' processors that ours can stand in for.
        layout: of the video tokens, from the configuration and the arguments of forward.
        rising: whether timesteps rise while a video is denoised.
        sharded_by: who can share its video out over ranks: diffusers, hooks of ours or nobody.
        gate_bias: whether gates of the coarse branch have one.
    """

    transformer: str
    blocks: tuple[str, ...]
    attention: str
    processor: type[own.SparseProcessor]
    replaces: tuple[str, ...]
    layout: Callable[[Any, Call], Layout]
    rising: bool = False
    sharded_by: Literal["diffusers", "hooks"] | None = None
    gate_bias: bool = True

    def layers(self, transformer: nn.Module) -> dict[str, nn.Module]:
        """The self-attention modules by the path of their block, in the order they run."""
        return {
            f"{name}.{index}": attrgetter(self.attention)(block)
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


def _ltx2(config: Any, call: Call) -> Layout:
    if call.get("video_self_attention_mask") is not None:
        raise NotImplementedError(
            "video_self_attention_mask must be None where video attention is sparse, but it is a "
            "tensor: call the transformer without it, or remove_vsa(transformer) first"
        )
    tokens = call["hidden_states"].shape[1]
    extents = tuple(call.get(name) for name in ("num_frames", "height", "width"))
    coordinates = call.get("video_coords")
    if None not in extents and math.prod(extents) == tokens:  # type: ignore[arg-type]
        return Layout(extents)  # type: ignore[arg-type]
    if coordinates is None or None in extents:
        raise ValueError(
            f"num_frames, height and width are {extents} for {tokens} tokens, but LTX-2 packs its "
            "video, so that VSA needs all three, and video_coords where tokens are appended: pass "
            "them to the transformer"
        )
    return layout_with_appended(coordinates, extents, tokens)  # type: ignore[arg-type]


def _skyreels(config: Any, call: Call) -> Layout:
    frames = config.num_frame_per_block
    layout = _wan(config, call)
    return layout._replace(mask=ChunkCausal(frames)) if frames > 1 else layout


def _kandinsky5(config: Any, call: Call) -> Layout:
    if call.get("sparse_params") is not None:
        raise NotImplementedError(
            "sparse_params must be None where attention is sparse by VSA, but it is given, so that "
            "Kandinsky's own block sparsity would choose in another order of tokens: call "
            'transformer.register_to_config(attention_type="regular") first'
        )
    _, T, H, W, _ = call["hidden_states"].shape
    t, h, w = config.patch_size
    return Layout((T // t, H // h, W // w))


def _consisid(config: Any, call: Call) -> Layout:
    _, T, _, H, W = call["hidden_states"].shape
    return Layout((T, H // config.patch_size, W // config.patch_size))


def _kandinsky6(config: Any, call: Call) -> Layout:
    """A frame that takes an earlier place in time, as a reference does, stands after the video."""
    layout = _kandinsky5(config, call)
    places = call.get("visual_rope_pos")
    if places is None:
        return layout
    t, h, w = layout.shape
    times = places[0].detach().cpu()
    falls = (times.diff() <= 0).nonzero().flatten()
    frames = int(falls[0]) + 1 if len(falls) else t
    return Layout((frames, h, w), 0, (t - frames) * h * w)


def _anyflow(config: Any, call: Call) -> Layout:
    _, T, _, H, W = call["hidden_states"].shape
    t, h, w = config.patch_size
    return Layout((T // t, H // h, W // w))


def _framepack(config: Any, call: Call) -> Layout:
    """Earlier frames, less exact the longer ago, stand before the video's own."""
    patch = (config.patch_size_t, config.patch_size, config.patch_size)
    _, _, T, H, W = call["hidden_states"].shape
    before = 0
    # diffusers packs each by a convolution of its own, whose strides do not depend on patch_size.
    for name, stride in (
        ("clean", (1, 2, 2)),
        ("history_2x", (2, 4, 4)),
        ("history_4x", (4, 8, 8)),
    ):
        latents = call.get(f"latents_{name}")
        if latents is not None and call.get(f"indices_latents_{name}") is not None:
            extents = zip(latents.shape[2:], stride, strict=True)
            up = name != "clean"  # padded to whole strides
            before += math.prod(-(-size // step) if up else size // step for size, step in extents)
    t, h, w = patch
    return Layout((T // t, H // h, W // w), before)


_STREAMS = ("transformer_blocks",)
FAMILIES = (
    Family(
        "WanTransformer3DModel",
        ("blocks",),
        "attn1",
        own.WanSparseProcessor,
        ("WanAttnProcessor",),
        _wan,
        sharded_by="diffusers",
    ),
    Family(
        "LTXVideoTransformer3DModel",
        _STREAMS,
        "attn1",
        own.LTXSparseProcessor,
        ("LTXVideoAttnProcessor",),
        _ltx,
        sharded_by="diffusers",
    ),
    Family(
        "HunyuanVideoTransformer3DModel",
        (*_STREAMS, "single_transformer_blocks"),
        "attn",
        joint.HunyuanVideoSparseProcessor,
        ("HunyuanVideoAttnProcessor2_0",),
        _hunyuan,
        sharded_by="hooks",
    ),
    Family(
        "HunyuanVideo15Transformer3DModel",
        _STREAMS,
        "attn",
        joint.HunyuanVideo15SparseProcessor,
        ("HunyuanVideo15AttnProcessor2_0",),
        _hunyuan,
        sharded_by="hooks",
    ),
    Family(
        "CogVideoXTransformer3DModel",
        _STREAMS,
        "attn1",
        joint.CogVideoXSparseProcessor,
        ("CogVideoXAttnProcessor2_0",),
        _cogvideox,
        sharded_by="hooks",
    ),
    Family(
        "MochiTransformer3DModel",
        _STREAMS,
        "attn1",
        joint.MochiSparseProcessor,
        ("MochiAttnProcessor2_0",),
        _mochi,
        rising=True,
        sharded_by="hooks",
    ),
    Family(
        "WanVACETransformer3DModel",
        ("vace_blocks", "blocks"),
        "attn1",
        own.WanSparseProcessor,
        ("WanAttnProcessor",),
        _wan,
    ),
    Family(
        "WanAnimateTransformer3DModel",
        ("blocks",),
        "attn1",
        own.WanSparseProcessor,
        ("WanAttnProcessor",),
        _wan,
    ),
    Family(
        "LTX2VideoTransformer3DModel",
        _STREAMS,
        "attn1",
        video.LTX2SparseProcessor,
        ("LTX2AudioVideoAttnProcessor", "LTX2PerturbedAttnProcessor"),
        _ltx2,
    ),
    Family(
        "SkyReelsV2Transformer3DModel",
        ("blocks",),
        "attn1",
        own.WanSparseProcessor,
        ("SkyReelsV2AttnProcessor",),
        _skyreels,
    ),
    Family(
        "Kandinsky5Transformer3DModel",
        ("visual_transformer_blocks",),
        "self_attention",
        video.Kandinsky5SparseProcessor,
        ("Kandinsky5AttnProcessor",),
        _kandinsky5,
    ),
    Family(
        "HunyuanVideoFramepackTransformer3DModel",
        (*_STREAMS, "single_transformer_blocks"),
        "attn",
        joint.FramepackSparseProcessor,
        ("HunyuanVideoAttnProcessor2_0",),
        _framepack,
    ),
    Family(
        "MiniMaxH3Transformer3DModel",
        _STREAMS,
        "attn",
        MiniMaxH3SparseProcessor,
        ("MiniMaxH3AttnProcessor",),
        layout_of_packed,
        rising=True,
        gate_bias=False,
    ),
    Family(
        "ChronoEditTransformer3DModel",
        ("blocks",),
        "attn1",
        own.WanSparseProcessor,
        ("WanAttnProcessor",),
        _wan,
    ),
    Family(
        "CosmosTransformer3DModel",
        _STREAMS,
        "attn1",
        video.CosmosSparseProcessor,
        ("CosmosAttnProcessor2_0",),
        _wan,
    ),
    Family(
        "Kandinsky6Transformer3DModel",
        ("visual_transformer_blocks",),
        "video_dec_block.self_attention",
        video.Kandinsky6SparseProcessor,
        ("Kandinsky6AttnProcessor",),
        _kandinsky6,
    ),
    Family(
        "ConsisIDTransformer3DModel",
        _STREAMS,
        "attn1",
        joint.CogVideoXSparseProcessor,
        ("CogVideoXAttnProcessor2_0",),
        _consisid,
    ),
    Family(
        "EasyAnimateTransformer3DModel",
        _STREAMS,
        "attn1",
        joint.EasyAnimateSparseProcessor,
        ("EasyAnimateAttnProcessor2_0",),
        _mochi,
    ),
    Family(
        "AnyFlowTransformer3DModel",
        ("blocks",),
        "attn1",
        video.AnyFlowSparseProcessor,
        ("AnyFlowAttnProcessor",),
        _anyflow,
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
    name = type(transformer).__name__
    raise TypeError(
        f"transformer must be one of {', '.join(family.transformer for family in FAMILIES)}, "
        f"but it is a {name}{hint or why_not(name)}"
    )
