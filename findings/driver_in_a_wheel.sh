#!/usr/bin/env bash
# fastvideo-kernel 0.3.5 carries a part of NVIDIA's driver: its wheel of 23 MB holds libcuda of
# driver 580.178.04, 96 MB unpacked, and the extension with its Hopper kernels is linked to that
# file by a name of its own. A driver's library belongs to the kernel module of the machine, and
# tools that repair wheels are to leave it out (auditwheel: --exclude libcuda.so.1).
# Seen: one libcuda in the wheel, and the extension asks for it by the name with a hash.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" download --quiet --no-deps --only-binary=:all: --python-version=3.12 \
    --dest "$folder" fastvideo-kernel==0.3.5
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
import glob
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


with zipfile.ZipFile(glob.glob("fastvideo_kernel-*.whl")[0]) as wheel:
    names = wheel.namelist()
    drivers = [name for name in names if name.split("/")[-1].startswith("libcuda-")]
    (extension,) = (name for name in names if "_C/fastvideo_kernel_ops" in name)
    asked = needed(wheel.read(extension))
    for name in drivers:
        print(f"{name}: {wheel.getinfo(name).file_size / 1e6:.1f} MB")
print(f"{extension} asks for", *sorted(asked))
assert [name.split("/")[-1] for name in drivers] == ["libcuda-dcdf334a.so.580.178.04"]
assert drivers[0].split("/")[-1] in asked and "libcuda.so.1" not in asked, "it has changed"
PYTHON
