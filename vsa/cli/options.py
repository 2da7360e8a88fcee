# SPDX-License-Identifier: Apache-2.0
"""Options that several commands have, and how each is read."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
import typer

from vsa import backends
from vsa.values import checks
from vsa.values.grid import SLOTS, Extent
from vsa.values.precision import DTYPES as LOW_DTYPES
from vsa.values.precision import HEAD_DIMS as LOW_HEAD_DIMS
from vsa.values.precision import Precision, named
from vsa.values.score import Score, SubBlocks

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPE_HELP = "fp32, bf16 or fp16 (float32 and so on, as tables print them, are the same)."


def parse_topk(text: str) -> float:
    """A whole number of key tiles, or a share such as 0.125."""
    try:
        value = float(text) if set(text) & set(".e") else int(text)
        checks.top_k(value, num_tiles=1)
    except ValueError:
        raise typer.BadParameter(
            f"topk must be a whole number of at least 1 or a share in (0, 1], but it is {text!r}"
        ) from None
    return value


def parse_extent(text: str) -> Extent:
    """Three token counts such as 21,30,52."""
    try:
        return checks.extent("it", [int(part) for part in text.replace("x", ",").split(",")])
    except (ValueError, TypeError):
        raise typer.BadParameter(
            f"three whole numbers of at least 1 such as 21,30,52 are needed, but it is {text!r}"
        ) from None


def parse_score(text: str) -> Score:
    """mean, or sub-blocks:N."""
    if text == "mean":
        return "mean"
    name, _, number = text.partition(":")
    if name != "sub-blocks" or not number.isdecimal():
        raise typer.BadParameter(
            f"a score must be mean or sub-blocks:N, such as sub-blocks:4, but it is {text!r}"
        )
    try:
        return SubBlocks(int(number))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def parse_precision(text: str) -> Precision:
    """native, int8 or fp8."""
    try:
        return named(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def parse_tile(text: str) -> Extent | Literal["auto"]:
    """A tile such as 4,4,4, or auto."""
    if text == "auto":
        return "auto"
    try:
        return checks.tile("tile", parse_extent(text), SLOTS)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def parse_device(text: str) -> torch.device:
    """A device that exists here; auto is the GPU if there is one."""
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        raise typer.BadParameter(
            f"device must be auto, cpu, cuda or cuda:N, but it is {text!r}"
        ) from None
    if device.type == "meta":
        raise typer.BadParameter("device must hold numbers, but it is 'meta'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise typer.BadParameter(
            f"device {text} is not here: {torch.cuda.device_count()} GPUs are visible"
        )
    return device


def parse_dtype(text: str) -> torch.dtype:
    """fp32, bf16 or fp16, or the name that PyTorch has for it."""
    by_name = DTYPES | {str(each).removeprefix("torch."): each for each in DTYPES.values()}
    if text not in by_name:
        raise typer.BadParameter(f"dtype must be one of {', '.join(by_name)}, but it is {text!r}")
    return by_name[text]


def check_backend(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    gradients: bool,
    precision: str = "native",
) -> str:
    """The backend that runs, with "auto" resolved."""
    if precision != "native" and (dtype not in LOW_DTYPES or head_dim not in LOW_HEAD_DIMS):
        raise typer.BadParameter(
            f"{precision} takes bf16 or fp16 and a head_dim of "
            f"{' or '.join(map(str, LOW_HEAD_DIMS))}, but the type is "
            f"{str(dtype).removeprefix('torch.')} and the head_dim {head_dim}",
            param_hint="--precision",
        )
    try:
        return backends.choose(
            name, device.type, device.index, str(dtype), head_dim, gradients, precision
        )
    except (ValueError, RuntimeError) as error:
        raise typer.BadParameter(str(error), param_hint="--backend") from None


Topk = Annotated[
    float,
    typer.Option(
        "--topk",
        parser=parse_topk,
        metavar="N",
        help="Key tiles per query tile: a share such as 0.125, or a whole number.",
    ),
]
Device = Annotated[
    torch.device,
    typer.Option(
        "--device", parser=parse_device, metavar="DEVICE", help="auto, cpu, cuda or cuda:N."
    ),
]
BackendName = Annotated[
    str, typer.Option("--backend", help="auto, hopper, emulated, flex or torch.")
]
TileShape = Annotated[
    Any,
    typer.Option(
        "--tile",
        parser=parse_tile,
        metavar="T,H,W",
        help="Tokens per tile, at most 64 in all; or auto.",
    ),
]
