# SPDX-License-Identifier: Apache-2.0
"""Who computes attention: one object per backend, one decision, a reason for all who cannot.

Not public. ``choose`` turns ``backend=`` into a name; the name travels through the operators, and
``named`` gives the object that computes every stage.
"""

from __future__ import annotations

import warnings

from vsa.backends.base import Backend, Request
from vsa.backends.flex import FlexBackend
from vsa.backends.kernels import EmulatedBackend, HopperBackend
from vsa.backends.torch_backend import TorchBackend, TransformsBackend

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        HopperBackend("hopper", "sm_90a kernels for production"),
        EmulatedBackend("emulated", "the same kernels on a CPU, for tests; slow by nature"),
        FlexBackend(
            "flex",
            "FlexAttention on any CUDA GPU; on a CPU forward only and dense in cost, for tests",
        ),
        TorchBackend("torch", "PyTorch on anything: gathers the selected tiles, sparse in cost"),
    )
}
"""What ``backend=`` may name."""

TRANSFORMS = TransformsBackend("transforms", "PyTorch's operators for forward mode and torch.func")
"""Takes the place of ``torch`` for tensors that need more than a backward."""

_NAMED = BACKENDS | {TRANSFORMS.name: TRANSFORMS}


def named(name: str) -> Backend:
    """The backend of a name that ``choose`` returned."""
    return _NAMED[name]


def choose(
    name: str,
    device: str,
    index: int | None,
    dtype: str,
    head_dim: int,
    gradients: bool,
    precision: str = "native",
    masked: bool = False,
) -> str:
    """The backend that runs on this device; the arguments after ``name`` as in ``Request``.

    "auto" takes the first of hopper, flex and torch on a CUDA device and torch elsewhere. The first
    time that a CUDA device gets something slower than hopper, it says so once. In low precision it
    takes nothing slower there: what is asked for is speed.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend asked for by name that cannot run here, or "auto" in low precision
            on a CUDA device without a kernel for it.
    """
    request = Request(device, index, dtype, head_dim, gradients, precision, masked)
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
    if request.precision != "native":
        if (reason := BACKENDS["hopper"].why_not(request)) is None:
            return "hopper"
        raise RuntimeError(
            f"precision {request.precision!r} cannot be computed on this GPU, hopper: {reason}; "
            'backend="torch" simulates it, more slowly than precision="native" is computed'
        )
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
