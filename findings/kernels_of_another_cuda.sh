#!/usr/bin/env bash
# sglang 0.5.23's extra "diffusion" pins vsa 0.0.4 and st_attn 0.0.7, FastVideo's kernels, beside
# torch 2.14.1. No H100 can run them there: their extensions were linked to CUDA 12's runtime
# (libcudart.so.12), and that torch brings CUDA 13's; a function of libc10_cuda that they ask for is
# gone from it too. pip installs all three without a word. On an H100 `import vsa` then ends in an
# ImportError, of which SGLang says that "Video Sparse Attention backend is not installed"; other
# GPUs take its Triton kernel. Whoever installs CUDA 12's runtime as well meets the missing function.
# Seen: the pins, the library that both extensions ask for, and torch's own requirement.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
wheel=(--quiet --no-deps --only-binary=:all: --python-version=3.12)
"$folder/env/bin/pip" download "${wheel[@]}" --dest "$folder" sglang==0.5.23 vsa==0.0.4 st_attn==0.0.7
"$folder/env/bin/pip" install "${wheel[@]}" --dry-run --ignore-installed --target "$folder/none" \
    --report "$folder/torch.json" torch==2.14.1
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
import glob
import json
import struct
import zipfile


def needed(elf):
    """Names of the libraries that a 64-bit ELF file asks for, from its dynamic section."""
    (offset,) = struct.unpack_from("<Q", elf, 0x28)
    size, count = struct.unpack_from("<HH", elf, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", elf, offset + i * size) for i in range(count)]
    (dynamic,) = (section for section in sections if section[1] == 6)
    strings = sections[dynamic[6]][4]
    entries = struct.iter_unpack("<qQ", elf[dynamic[4] : dynamic[4] + dynamic[5]])
    places = [strings + value for tag, value in entries if tag == 1]
    return [elf[place : elf.index(0, place)].decode() for place in places]


with zipfile.ZipFile(glob.glob("sglang-*.whl")[0]) as packed:
    (name,) = (name for name in packed.namelist() if name.endswith(".dist-info/METADATA"))
    lines = packed.read(name).decode().splitlines()
wanted = [line.split(": ")[1] for line in lines if line.startswith("Requires-Dist: ")]
pins = [x for x in wanted if x.split("=")[0] in ("torch", "vsa", "st_attn")]
print("sglang 0.5.23 requires", *pins, sep="\n  ")
assert [x.split(";")[0] for x in pins] == ["torch==2.14.1", "st_attn==0.0.7", "vsa==0.0.4"]

runtimes = {}
for kernels in ("vsa", "st_attn"):
    with zipfile.ZipFile(glob.glob(f"{kernels}-*.whl")[0]) as packed:
        (name,) = (name for name in packed.namelist() if name.endswith(".so"))
        asked = needed(packed.read(name))
    runtimes[kernels] = [x for x in asked if x.startswith("libcudart")]
    print(f"{name} asks for", *runtimes[kernels])
assert set(map(tuple, runtimes.values())) == {("libcudart.so.12",)}, "it has changed"

with open("torch.json") as report:
    (torch,) = json.load(report)["install"]
brings = [x for x in torch["metadata"]["requires_dist"] if x.startswith("cuda-toolkit[")]
print(f"torch {torch['metadata']['version']} requires", *brings)
assert len(brings) == 1 and "==13." in brings[0], "it has changed"
PYTHON
