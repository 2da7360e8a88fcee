# SPDX-License-Identifier: Apache-2.0
"""Who runs the fine stage: one list, one decision per device, a reason for all who cannot."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch


@dataclass(frozen=True)
class Request:
    """What a backend is asked to do.

    Attributes:
        device: device type, "cpu" or "cuda" for instance.
        index: which of that type, None for the current one.
        dtype: type of q, k and v; None when only the machine is asked about.
        head_dim: channels of a head, likewise.
        gradients: whether gradients are wanted.
    """

    device: str
    index: int | None = None
    dtype: str | None = None
    head_dim: int | None = None
    gradients: bool = False


@dataclass(frozen=True)
class Backend:
    """One way of computing the fine stage.

    Attributes:
        name: what ``backend=`` calls it.
        purpose: where it runs and what for, in a line.
        why_not: what is missing here for a request, or None if it can run.
    """

    name: str
    purpose: str
    why_not: Callable[[Request], str | None]


def _hopper(request: Request) -> str | None:
    if request.device != "cuda" or torch.cuda.get_device_capability(request.index) != (9, 0):
        return "it needs a CUDA device of compute capability 9.0 (H100, H200)"
    return _kernels(request, cuda=True)


def _emulated(request: Request) -> str | None:
    if request.device != "cpu":
        return "it emulates the kernels on a CPU, for CPU tensors"
    return _kernels(request, cuda=False)


def _kernels(request: Request, cuda: bool) -> str | None:
    """What the kernels of both machines need."""
    try:
        from vsa import _C
    except ImportError:
        return "the compiled part of vsa is missing, see vsa info"
    if cuda and not _C.build_info()["cuda"]:
        return "vsa was built without its CUDA kernels, see vsa info"
    dtype = request.dtype and request.dtype.removeprefix("torch.")
    if dtype not in (None, *_C.ELEMENTS):
        return f"the kernels take {' and '.join(_C.ELEMENTS)}, not {dtype}"
    if request.head_dim not in (None, *_C.HEAD_DIMS):
        allowed = " or ".join(map(str, _C.HEAD_DIMS))
        return f"the kernels take a head_dim of {allowed}, not {request.head_dim}"
    return None


def _flex(request: Request) -> str | None:
    if request.device not in ("cuda", "cpu"):
        return f"FlexAttention is not supported here on {request.device} devices"
    if request.device == "cpu":
        return "FlexAttention has no gradients on a CPU" if request.gradients else None
    if find_spec("triton") is None:
        return "FlexAttention compiles with Triton, which is not installed"
    if request.dtype == "torch.float64":
        return "FlexAttention has no float64 on a GPU"
    if request.gradients and request.dtype in ("torch.bfloat16", "torch.float16"):
        return "FlexAttention's 16-bit backward has no kernel for blocks of 64 tokens"
    if request.head_dim is not None and request.head_dim < 16:
        return f"FlexAttention needs a head_dim of at least 16 on a GPU, not {request.head_dim}"
    return None


def _torch(request: Request) -> str | None:
    return None


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("hopper", "sm_90a kernels for production", _hopper),
        Backend("emulated", "the same kernels on a CPU, for tests; slow by nature", _emulated),
        Backend(
            "flex",
            "FlexAttention on any CUDA GPU; on a CPU forward only and dense in cost, for tests",
            _flex,
        ),
        Backend("torch", "PyTorch on anything: gathers the selected tiles, sparse in cost", _torch),
    )
}


def choose(
    name: str, device: str, index: int | None, dtype: str, head_dim: int, gradients: bool
) -> str:
    """The backend that runs on this device; the arguments after ``name`` as in ``Request``.

    "auto" takes the first of hopper, flex and torch on a CUDA device and torch elsewhere. The first
    time that a CUDA device gets something slower than hopper, it says so once.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend asked for by name that cannot run here.
    """
    request = Request(device, index, dtype, head_dim, gradients)
    if name == "auto":
        return _automatic(request)
    if not isinstance(name, str) or name not in BACKENDS:
        allowed = ", ".join(map(repr, BACKENDS))
        raise ValueError(f'backend must be "auto" or one of {allowed}, but it is {name!r}')
    if (missing := BACKENDS[name].why_not(request)) is not None:
        raise RuntimeError(f"backend {name!r} cannot run here: {missing}")
    return name


# What torch.compiler.assume_constant_result sets: compiled code takes the decision as it was when
# it was traced. The decorator itself would load torch._dynamo, twice the time of import torch.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]

_warned: set[tuple[int | None, str]] = set()


def _automatic(request: Request) -> str:
    if request.device != "cuda":
        return "torch"
    missing = []
    for chosen in ("hopper", "flex", "torch"):
        if (reason := BACKENDS[chosen].why_not(request)) is None:
            break
        missing.append(f"{chosen}: {reason}")
    if missing and (request.index, chosen) not in _warned:
        _warned.add((request.index, chosen))
        why = "; ".join(missing)
        warnings.warn(
            f"vsa runs on the slower backend {chosen!r} on this GPU ({why})", stacklevel=2
        )
    return chosen
