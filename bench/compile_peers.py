# SPDX-License-Identifier: Apache-2.0
"""Compile attention kernels of others that come as CUDA C++, for bench/peers.py.

usage: python bench/compile_peers.py --peers DIR [--sparge CLONE] [--only flashinfer_sm90 sparge]

DIR holds archives of bench/fetch_peers.py, and gets two more, so that nothing is compiled on the
machine with the GPU. Each is compiled with the flags of the project's own build. What runs this
must be the Python and the torch of that machine; nvcc is needed, and no GPU.

flashinfer_sm90  FlashInfer's cake of the archive "flashinfer": its planner, its persistent kernels
                 in bf16 and fp8, and those that quantise
sparge           SpargeAttention's kernel for Hopper, of a clone of github.com/thu-ml/SpargeAttn at
                 the commit below, for bf16 and head_dim 64 and 128
"""

from __future__ import annotations

import argparse
import importlib
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from rich.console import Console

from comparison.archives import Unavailable, unpacked

SPARGE_COMMIT = "bfd980b781784c04ad6a53e7ee657c0645d99171"
STAGES = [
    f"attention{precision}{schedule}"
    for precision, schedule in product(("", "_fp8"), ("", "_queue", "_compact", "_tagged"))
] + ["quantize_qk_vamax", "quantize_v"]
"""Of cake; the others are for problems that fit one wave, and for fewer key heads."""

HOPPER = "-gencode=arch=compute_90a,code=sm_90a"
LIBRARY = "-Xcompiler=-fPIC", "-cudart=shared"
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
    parts = [to.with_name(f"{to.stem}-{number}.o") for number in range(len(sources))]
    folders = [f"-I{folder}" for folder in include]
    steps = [
        [nvcc, *flags, *folders, HOPPER, *LIBRARY, "-c", str(source), "-o", str(part)]
        for source, part in zip(sources, parts, strict=True)
    ]
    # Symbols of the driver, and of instances that are not called, stay open until they are.
    link = [nvcc, "-shared", *LIBRARY, "-Xlinker=-z,lazy", *map(str, parts), *libraries]
    link += ["-o", str(to)]

    def run(step: Sequence[str]) -> None:
        done = subprocess.run(step, capture_output=True, text=True)
        if done.returncode:
            said = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
            raise SystemExit(f"{' '.join(step)}\n{said}")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, steps))
    run(link)
    for part in parts:
        part.unlink()


def cake(nvcc: str, source: Path, to: Path) -> None:
    """Some kernels, in the folder where FlashInfer's package looks for them, and the package."""
    sys.path[:0] = [str(source), str(source / "flashinfer")]
    loader = importlib.import_module("cake_vsa_sm90_backend.cake_jit")
    builder = importlib.import_module("cake_vsa_sm90_backend.cake_build")
    package = source / "flashinfer" / "cake_vsa_sm90_backend"
    common, release = builder.manifest()["common"], cuda_release(nvcc)
    include = [package / folder for folder in common["include_dirs"]]
    include += [source / "tvm_ffi" / "include"]
    made = to / "flashinfer" / package.name
    for folder in ("flashinfer/cake_vsa_sm90_backend", "tvm_ffi"):
        shutil.copytree(source / folder, to / folder, ignore=shutil.ignore_patterns("*.cu", "*.h"))
    (made / "aot").mkdir()

    def make(stage: str) -> None:
        entry = builder.libraries_by_name()[loader.library_name(stage, "sm_90a")]
        groups = [*common["nvcc_flags_if"], *entry["nvcc_flags_if"]]
        flags = [*common["nvcc_flags"], *entry["nvcc_flags"]]
        flags += builder._conditional_flags(groups, release[:2])
        units = [package / unit for unit in entry["sources"]]
        compiled(nvcc, units, flags, include, made / entry["path"])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(make, STAGES))
    info = {
        "schema": "cake-build-info/1",
        "cuda": ".".join(map(str, release)),
        "cudart_version": 1000 * release[0] + 10 * release[1],
        "arches": ["sm_90a"],
    }
    (made / "aot" / "build_info.json").write_text(json.dumps(info))


def cuda_release(nvcc: str) -> tuple[int, int, int]:
    """Of a compiler: 13, 0 and 88, for instance."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V(\d+)\.(\d+)\.(\d+)", said)
    if found is None:
        raise SystemExit(f"{nvcc} --version names no release: {said.strip()}")
    major, minor, patch = map(int, found.groups())
    return major, minor, patch


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
