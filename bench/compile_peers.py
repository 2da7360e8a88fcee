# SPDX-License-Identifier: Apache-2.0
"""Compile attention kernels of others that come as CUDA C++, for bench/peers.py.

usage: python bench/compile_peers.py --peers DIR [--sparge CLONE] [--only flashinfer_sm90 sparge]

DIR holds archives of bench/fetch_peers.py, and gets two more, so that nothing is compiled on the
machine with the GPU. Each is compiled with the flags of the project's own build. What runs this
must be the Python and the torch of that machine; nvcc is needed, and no GPU.

flashinfer_sm90  the two persistent kernels of FlashInfer's cake, of the archive "flashinfer"
sparge           SpargeAttention's kernel for Hopper, of a clone of github.com/thu-ml/SpargeAttn at
                 the commit below, for bf16 and head_dim 64 and 128
"""

from __future__ import annotations

import argparse
import json
import lzma
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from comparison.archives import Unavailable, unpacked

SPARGE_COMMIT = "bfd980b781784c04ad6a53e7ee657c0645d99171"
STAGES = "attention", "attention_queue"
"""Of cake; the others are for problems that fit one wave."""

HOPPER = "-gencode=arch=compute_90a,code=sm_90a"
LIBRARY = "-Xcompiler=-fPIC", "-cudart=shared"
CAKE_FLAGS = [
    "-std=c++17", "-O3", "-DNDEBUG", "-use_fast_math", "--expt-relaxed-constexpr",
    "-static-global-template-stub=false", "-Xfatbin=-compress-all", "--compress-mode=size",
    "-DPy_LIMITED_API=0x03090000", "-DFLASHINFER_ENABLE_F16", "-DFLASHINFER_ENABLE_BF16",
    "-DFLASHINFER_ENABLE_FP8_E4M3", "-DFLASHINFER_ENABLE_FP8_E5M2",
    "-DFLASHINFER_ENABLE_FP8_E8M0", "-DFLASHINFER_ENABLE_FP4_E2M1",
    "-DCUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED",
]  # fmt: skip
SPARGE_FLAGS = [
    "-std=c++17", "-O3", "--use_fast_math", "-U__CUDA_NO_HALF_OPERATORS__",
    "-U__CUDA_NO_HALF_CONVERSIONS__", "-diag-suppress=174", "--expt-relaxed-constexpr",
    "-DENABLE_BF16", "-DHAS_SM90", "-DTORCH_API_INCLUDE_EXTENSION_H",
    "-DTORCH_EXTENSION_NAME=sparge_sm90",
]  # fmt: skip
TORCH_LIBRARIES = "c10", "c10_cuda", "torch", "torch_cpu", "torch_cuda", "torch_python"
SPARGE_FILES = "csrc/fused/fused.cu", "csrc/qattn/qk_int_sv_f8_cuda_sm90.cu"
BINDING = Path("comparison", "sparge_binding.cpp")
INSTANCE = (
    "csrc/qattn/instantiations_sm90/"
    "inst_sm90_ctaq64_ctak128_nt128_hd{}_qkg1_pvth0_onv_bfloat16_causal0_fv1_retpv0.cu"
)


def compiled(
    nvcc: str,
    sources: Sequence[Path],
    flags: Sequence[str],
    include: Sequence[Path],
    to: Path,
    libraries: Sequence[str] = (),
) -> None:
    """A shared library of sources, linked with libraries by the options that name them.

    Raises:
        SystemExit: with the last lines of what nvcc said.
    """
    parts = [to.with_name(f"{number}.o") for number in range(len(sources))]
    folders = [f"-I{folder}" for folder in include]
    steps = [
        [nvcc, *flags, *folders, HOPPER, *LIBRARY, "-c", str(source), "-o", str(part)]
        for source, part in zip(sources, parts, strict=True)
    ]
    # Symbols of the driver, and of instances that are not called, stay open until they are.
    link = [nvcc, "-shared", *LIBRARY, "-Xlinker=-z,lazy", *map(str, parts), *libraries]
    link += ["-o", str(to)]
    for step in (*steps, link):
        done = subprocess.run(step, capture_output=True, text=True)
        if done.returncode:
            said = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
            raise SystemExit(f"{' '.join(step)}\n{said}")
    for part in parts:
        part.unlink()


def cake(nvcc: str, source: Path, to: Path) -> None:
    """The kernels of some stages, each in the folder where FlashInfer looks for it."""
    data = source / "flashinfer" / "data"
    folder = data / "csrc" / "cake_vsa_sm90"
    include = folder, folder.parent, data / "include", source / "tvm_ffi" / "include"
    manifest = json.loads((folder / "cake_vsa_sm90_manifest.json").read_text())
    for module in manifest["modules"]:
        if module["route"]["stage"] not in STAGES:
            continue
        name = f"{module['name']}_sm_90a"
        units = [data / module["translation_units"][unit] for unit in ("device", "binding")]
        flags = [*CAKE_FLAGS, *module["compile_flags"]]
        (to / name).mkdir()
        compiled(nvcc, units, flags, include, to / name / f"{name}.so")


def sparge(nvcc: str, clone: Path, to: Path) -> None:
    """The kernel, its quantisation of V, and the Python file that quantises Q and K.

    Raises:
        SystemExit: a clone at another commit.
    """
    from torch.utils import cpp_extension

    at = subprocess.run(
        ["git", "-C", str(clone), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    if at != SPARGE_COMMIT:
        raise SystemExit(f"--sparge must be a clone at {SPARGE_COMMIT}, but it is at {at}")
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        shutil.copytree(clone / "csrc", work / "csrc")
        subprocess.run(
            [sys.executable, str(work / "csrc/qattn/instantiations_sm90/autogen.py")],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        names = [*SPARGE_FILES, *(INSTANCE.format(head_dim) for head_dim in (64, 128))]
        sources = [*(work / name for name in names), Path(__file__).parent / BINDING]
        include = [work / "csrc", *map(Path, cpp_extension.include_paths())]
        include += Path(sysconfig.get_path("purelib")).glob("nvidia/*/include")
        include.append(Path(sysconfig.get_path("include")))
        libraries = [f"-L{folder}" for folder in cpp_extension.library_paths()]
        libraries += [f"-l{name}" for name in TORCH_LIBRARIES]
        compiled(nvcc, sources, SPARGE_FLAGS, include, to / "sparge_sm90.so", libraries)
    python = to / "spas_sage_attn" / "utils.py"
    python.parent.mkdir()
    shutil.copy(clone / "spas_sage_attn" / "utils.py", python)


MADE = {"flashinfer_sm90": cake, "sparge": sparge}


def pack(folder: Path, name: str, to: Path) -> None:
    """Write a folder as an archive."""
    with lzma.open(to, "wb") as packed, tarfile.open(fileobj=packed, mode="w|") as tar:
        tar.add(folder, name)


def main() -> None:
    """Compile, pack, say what was written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", type=Path, required=True, metavar="DIR")
    parser.add_argument("--sparge", type=Path, metavar="CLONE")
    parser.add_argument("--only", nargs="+", choices=MADE, default=list(MADE))
    parser.add_argument("--nvcc", default="nvcc", metavar="FILE")
    options = parser.parse_args()
    console = Console()
    for name in options.only:
        if name == "sparge" and options.sparge is None:
            console.print("sparge: skipped, for no --sparge names a clone")
            continue
        try:
            source = options.sparge if name == "sparge" else unpacked("flashinfer", [options.peers])
        except Unavailable as reason:
            raise SystemExit(str(reason)) from None
        archive = options.peers / f"{name}.tar.xz"
        with tempfile.TemporaryDirectory() as scratch, console.status(f"{name}: compiling"):
            MADE[name](options.nvcc, source, Path(scratch))
            pack(Path(scratch), name, archive)
        console.print(f"{archive}: {archive.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
