# SPDX-License-Identifier: Apache-2.0
"""Wan2.1 transformers for ``vsa wan``: from their public configurations, or from a local folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import filterfalse
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vsa.integrations.checkpoints.names import WAN, diffusers_name
from vsa.integrations.diffusers.gate_files import gates_in, is_gate
from vsa.values.grid import Extent

FRAMES_PER_LATENT, PIXELS_PER_LATENT = 4, 8
"""What one latent of Wan's VAE stands for, along t and along each of h and w."""
PIXELS_PER_TOKEN = 2 * PIXELS_PER_LATENT
LATENT_CHANNELS = 16
TEXT_TOKENS = 512

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "1.3b": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "14b": {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
    "tiny": {
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "ffn_dim": 256,
        "num_layers": 2,
        "text_dim": 32,
        "freq_dim": 32,
    },
}
"""What differs from the defaults of WanTransformer3DModel; "tiny" is no model of anybody's."""


@dataclass(frozen=True)
class Size:
    """A video in pixels.

    Attributes:
        frames: 4 n + 1 of them.
        height: a multiple of 16.
        width: a multiple of 16.
    """

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if self.frames < 1 or self.frames % FRAMES_PER_LATENT != 1:
            raise ValueError(f"frames must be 4 n + 1, as 81 is, but there are {self.frames}")
        for name in ("height", "width"):
            pixels = getattr(self, name)
            if pixels < 1 or pixels % PIXELS_PER_TOKEN:
                raise ValueError(
                    f"{name} must be a multiple of {PIXELS_PER_TOKEN} pixels, but it is {pixels}"
                )

    @property
    def latents(self) -> Extent:
        """(T, H, W) of the latent video."""
        return (
            (self.frames - 1) // FRAMES_PER_LATENT + 1,
            self.height // PIXELS_PER_LATENT,
            self.width // PIXELS_PER_LATENT,
        )

    @property
    def grid(self) -> Extent:
        """(T, H, W) of the tokens, 1x2x2 latents each."""
        T, H, W = self.latents
        return T, H // 2, W // 2

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


SIZES = {
    "480p": Size(81, 480, 832),
    "448p": Size(61, 448, 832),
    "720p": Size(81, 720, 1280),
    "tiny": Size(33, 256, 384),
}
"""By name; 448p is what FastVideo times its own kernels on."""


def random_model(
    name: str, layers: int | None, device: torch.device, dtype: torch.dtype
) -> WanTransformer3DModel:
    """A model of a public configuration with PyTorch's own random weights, made on the device.

    Args:
        name: one of ``CONFIGURATIONS``.
        layers: how many blocks; None for all of them.
        device: where it is made.
        dtype: of its weights, but for those that diffusers keeps in fp32.
    """
    config = {"text_dim": 4096, **CONFIGURATIONS[name]}
    if layers is not None:
        config["num_layers"] = layers
    return _model(config, device, dtype)


def _model(config: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    with device, _default_dtype(dtype):
        model = WanTransformer3DModel.from_config(config)
    kept = set(model._keep_in_fp32_modules)
    for path, parameter in model.named_parameters():
        if kept & set(path.split(".")):
            parameter.data = parameter.data.float()
    return model.eval().requires_grad_(False)


def loaded_model(
    folder: Path, device: torch.device, dtype: torch.dtype
) -> tuple[WanTransformer3DModel, dict[str, Tensor]]:
    """A text-to-video model from a folder, straight onto the device.

    (from_pretrained would need accelerate for Wan, and drops gates.)

    Args:
        folder: of a pipeline or of its transformer, in diffusers' format; parameters may have
            FastVideo's own names instead of diffusers'.
        device: where it goes.
        dtype: as in ``random_model``.

    Returns:
        The model, and the coarse gates that lie beside its weights in FastVideo's checkpoints, by
        ``blocks.N.to_gate_compress.weight`` and ``.bias``; none in most.

    Raises:
        ValueError: a folder that does not hold such a model.
    """
    inner = folder / "transformer"
    folder = inner if inner.is_dir() else folder
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(
            f"weights must be a folder in diffusers' format, with config.json or transformer/ in "
            f"it, but {folder} has neither"
        )
    described = json.loads(config.read_text())
    if described.get("_class_name") != "WanTransformer3DModel" or described.get("image_dim"):
        raise ValueError(
            "weights must be those of a text-to-video WanTransformer3DModel, but "
            f"{config} describes a {described.get('_class_name')} with image_dim "
            f"{described.get('image_dim')}"
        )
    model = _model(described, device, dtype)
    placed: set[str] = set()
    gates: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        held = _tensors(file, device)
        gates |= gates_in(held)
        tensors: dict[str, Tensor] = {}
        for name in filterfalse(is_gate, held):
            own = diffusers_name(WAN, name)
            if own in tensors or own in placed:
                raise ValueError(f"{file} holds {name}, which is there under another name already")
            tensors[own] = held[name]
        unknown = model.load_state_dict(tensors, strict=False).unexpected_keys
        if unknown:
            raise ValueError(f"{file} holds {unknown[0]}, which {config} has no place for")
        placed |= set(tensors)
    missing = set(model.state_dict()) - placed
    if missing:
        raise ValueError(f"weights must be complete, but {folder} lacks {min(missing)}")
    return model, gates


def loaded_gates(file: Path, device: torch.device) -> dict[str, Tensor]:
    """The coarse gates in a safetensors file, named as those of ``loaded_model``.

    Raises:
        ValueError: a file without any, or none of that format.
    """
    gates = gates_in(_tensors(file, device))
    if not gates:
        raise ValueError(
            f"{file} must hold blocks.N.to_gate_compress.weight and .bias of every layer, but it "
            "has no gates"
        )
    return gates


def _tensors(file: Path, device: torch.device) -> dict[str, Tensor]:
    try:
        return load_file(file, device=str(device))
    except SafetensorError as error:
        raise ValueError(
            f"{file} must be a safetensors file, but reading it fails: {error}"
        ) from None


def _weight_files(folder: Path) -> list[Path]:
    """One file, or the shards that an index names."""
    single = folder / "diffusion_pytorch_model.safetensors"
    index = folder / f"{single.name}.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
        return [folder / name for name in sorted(names)]
    if not single.is_file():
        raise ValueError(f"weights must hold {single.name} or its index, but {folder} does not")
    return [single]


def bytes_of(model: nn.Module) -> int:
    """What its weights and tables take."""
    return sum(x.nbytes for x in (*model.parameters(), *model.buffers()))


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
