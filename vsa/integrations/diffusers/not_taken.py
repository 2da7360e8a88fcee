# SPDX-License-Identifier: Apache-2.0
"""Video transformers of diffusers 0.42.1 that are not taken, and why."""

from __future__ import annotations

NOT_TAKEN = {
    "AllegroTransformer3DModel": "which masks single tokens of its video, as VSA cannot",
    "AnyFlowFARTransformer3DModel": "which mixes chunks at several resolutions, which is no grid",
    "HeliosTransformer3DModel": "which scales keys of earlier frames that it packs at several "
    "resolutions before its video",
    "JoyImageEditPlusTransformer3DModel": "which edits images, too few tokens to choose from",
    "JoyImageEditTransformer3DModel": "which edits images, too few tokens to choose from",
    "Kandinsky6SRTransformer3DModel": "whose attention is in windows of its own already",
    "LatteTransformer3DModel": "which attends frames and places apart, so that no layer sees the "
    "whole video",
    "MotifVideoTransformer3DModel": "whose attention holds a second one, over text and image",
    "SanaVideoTransformer3DModel": "whose self-attention is linear and chooses nothing",
    "SanaWMLTX2RefinerTransformer3DModel": "which attends keys that it keeps of earlier chunks",
    "SanaWMTransformer3DModel": "whose self-attention is linear and chooses nothing in most layers",
    "WanAnimate2Transformer3DModel": "which attends chunks under a mask and keeps keys of its own",
}
"""What to say of a class after its name."""


def why_not(name: str) -> str:
    """A clause to follow the name of a class that is known; else nothing."""
    return f", {NOT_TAKEN[name]}" if name in NOT_TAKEN else ""
