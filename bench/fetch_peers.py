# SPDX-License-Identifier: Apache-2.0
"""Fetch published attention kernels from PyPI and pack each for bench/peers.py.

usage: python bench/fetch_peers.py --out DIR [--only fa3 tk_vsa cudnn_bsa]

DIR/NAME.tar.xz is for CPython 3.12 on x86-64 Linux with a Hopper GPU; where the benchmark runs, no
network is needed. Archives that are already there stay as they are. Versions are pinned, so is the
SHA-256 of every wheel. The kernels keep their own licences (BSD-3-Clause, Apache-2.0, MIT, NVIDIA's
for CUDA's runtime and for the CUTLASS DSL): they are for measuring, not for passing on.

fa3                FlashAttention-3, forward and backward, as xformers ships it, with CUDA 12's
                   runtime
tk_vsa             FastVideo's block-sparse kernels of ThunderKittens
cutlass_dsl        the compiler of the CuTe DSL, which the next two need; packing it takes longest
cudnn_bsa          cudnn.BSA and cudnn.flex_attention of nvidia-cudnn-frontend
flash_attention_4  FlashAttention-4, in the CuTe DSL
einops             what FlashAttention-4 and SpargeAttention import
flashinfer         cake of FlashInfer: planner, sources, what they include and import
sglang             SGLang's Triton kernel for VSA-H3

bench/compile_peers.py makes two more, of what comes as CUDA C++.
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(17, 40)] + ["manylinux2014_x86_64"]

FILTERS = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 256 << 20}]
"""Machine code of several architectures repeats itself over long distances. It takes 3 GB."""


@dataclass(frozen=True)
class Wheel:
    """A wheel, and the regular expression of the files in it that are kept."""

    name: str
    version: str
    sha256: str
    keep: str


METADATA = r"|[^/]+\.dist-info/METADATA"
DSL = r"nvidia_cutlass_dsl/(?!dsl_packages/iket/|.*stubs/)(?!.*\.a$).*[^/]" + METADATA
PEERS = {
    "fa3": [
        Wheel(
            "xformers",
            "0.0.34",
            "381cc47f43e95893e21b7f04f1aa31dc10a81fc95ba92482e4465a5064c77743",
            r"xformers/flash_attn_3/_C\.so",
        ),
        Wheel(
            "nvidia-cuda-runtime-cu12",
            "12.8.90",
            "adade8dcbd0edf427b7204d480d6066d33902cab2a4707dcfc48a2d0fd44ab90",
            r"nvidia/cuda_runtime/lib/libcudart\.so\.12",
        ),
    ],
    "tk_vsa": [
        Wheel(
            "fastvideo-kernel",
            "0.3.2",
            "f5f1da94d9a1242596cf04f0c793b9693e3ff22aa0fee79f230e0875571f2485",
            r"fastvideo_kernel/_C/fastvideo_kernel_ops[^/]*\.so|fastvideo_kernel\.libs/libcudart.*",
        ),
    ],
    "cutlass_dsl": [
        Wheel(
            "nvidia-cutlass-dsl-libs-core",
            "4.8.1",
            "bacc6760e3286db447d45720d32ae58ac2e6cecade1152345ef784b2d5e44431",
            DSL,
        ),
        Wheel(
            "nvidia-cutlass-dsl-libs-base",
            "4.8.1",
            "ac2fd8c7fa3d6ded00917fa7cba8686061005da8c4703c6a29e03c1504543909",
            DSL,
        ),
        Wheel(
            "nvidia-cutlass-dsl-libs-cu13",
            "4.8.1",
            "50191a381d8cc1393373ae0bc879b0aefa9a256c23c22d4fa1c2fe3dfe57bc90",
            DSL,
        ),
        Wheel(
            "apache-tvm-ffi",
            "0.1.15.post2",
            "059eed9bfc94bcd41650fb8eefde74040a1bc7e7b1a6f0a8ff897b02b118875b",
            r"tvm_ffi/.*\.(py|so)" + METADATA,
        ),
    ],
    "cudnn_bsa": [
        Wheel(
            "nvidia-cudnn-frontend",
            "1.32.0",
            "8b354a8e550c083eb247f1eb39a7d69a4a269075f5a01e4fcbd2531680b17239",
            r"cudnn/[^/]+\.(py|so)"
            r"|cudnn/(engines|frost|block_sparse_attention|flex_attention)/.*\.py" + METADATA,
        ),
    ],
    "flash_attention_4": [
        Wheel(
            "flash-attn-4",
            "4.0.0b36",
            "b6f0e2a264334cb1b59289ddd309c7c76d3a8d184268316b43403e51ba8795d2",
            r"flash_attn/cute/.*\.py" + METADATA,
        ),
        Wheel(
            "quack-kernels",
            "0.6.5",
            "df1ddd31366c82eb9692fe087c671209189dcbde53c909c81a865d4ee66b158d",
            r"quack/.*\.py" + METADATA,
        ),
    ],
    "einops": [
        Wheel(
            "einops",
            "0.8.2",
            "54058201ac7087911181bfec4af6091bb59380360f069276601256a76af08193",
            r"einops/.*\.py" + METADATA,
        ),
    ],
    "flashinfer": [
        Wheel(
            "flashinfer-python",
            "0.7.4",
            "a051a62e09a2738e8b0de47a1944fd2f0f3eff01b728b662141ea660cb09dd32",
            r"flashinfer/cake_vsa_sm90_backend/.*[^/]" + METADATA,
        ),
        Wheel(
            "apache-tvm-ffi",
            "0.1.15.post2",
            "059eed9bfc94bcd41650fb8eefde74040a1bc7e7b1a6f0a8ff897b02b118875b",
            r"tvm_ffi/.*\.(py|so|h)" + METADATA,
        ),
    ],
    "sglang": [
        Wheel(
            "sglang",
            "0.5.23",
            "8d257a319395b322bb1be327d05e5528859358153c8563b04c0a4a3c8af164b6",
            r"sglang/multimodal_gen/runtime/layers/attention/backends/vsa_h3_kernels\.py"
            + METADATA,
        ),
    ],
}
RENAMED = {
    "xformers/flash_attn_3/_C.so": "flash_attn_3.so",
    "nvidia/cuda_runtime/lib/libcudart.so.12": "libcudart.so.12",
}
"""Files that stand at the top of their archive."""


def download(wheel: Wheel, folder: Path) -> Path:
    """The wheel by pip, its SHA-256 checked.

    Raises:
        SystemExit: with what pip said, or with the hash that was found.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder)]
    command += ["--only-binary=:all:", "--python-version=3.12", "--implementation=cp"]
    command += [f"--platform={platform}" for platform in PLATFORMS]
    wanted = f"{wheel.name}=={wheel.version}"
    done = subprocess.run([*command, wanted], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"pip did not download {wanted}:\n{done.stderr.strip()}")
    (path,) = folder.glob(f"{re.sub('[-.]+', '_', wheel.name)}-{wheel.version}-*.whl")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != wheel.sha256:
        raise SystemExit(f"{path.name} has the SHA-256 {digest}, but {wheel.sha256} is pinned")
    return path


def pack(name: str, wheels: list[tuple[Path, str]], to: Path) -> int:
    """Write an archive of the kept files of some wheels; how many there are.

    Raises:
        SystemExit: a wheel of which nothing is kept.
    """
    seen: set[str] = set()
    with (
        lzma.open(to, "wb", filters=FILTERS) as packed,
        tarfile.open(fileobj=packed, mode="w|") as tar,
        tempfile.TemporaryDirectory() as folder,
    ):
        for path, keep in wheels:
            with zipfile.ZipFile(path) as wheel:
                members = [x for x in sorted(wheel.namelist()) if re.fullmatch(keep, x)]
                if not members:
                    raise SystemExit(f"{path.name} holds no file that matches {keep}")
                for member in members:
                    inside = f"{name}/{RENAMED.get(member, member)}"
                    if inside not in seen:  # wheels of one package share a few files
                        seen.add(inside)
                        tar.add(wheel.extract(member, folder), inside)
    return len(seen)


def main() -> None:
    """Fetch, pack, say what was written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    for name in options.only:
        archive = options.out / f"{name}.tar.xz"
        if archive.exists():
            console.print(f"{archive}: there already")
            continue
        with tempfile.TemporaryDirectory() as folder, console.status("") as status:
            wheels = []
            for wheel in PEERS[name]:
                status.update(f"{name}: downloading {wheel.name} {wheel.version}")
                wheels.append((download(wheel, Path(folder)), wheel.keep))
            status.update(f"{name}: packing, which takes minutes")
            part = archive.with_suffix(".part")
            count = pack(name, wheels, part)
            part.rename(archive)
        console.print(f"{archive}: {count} files, {archive.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
