#!/usr/bin/env bash
# vLLM-Omni 0.30.0: with ring_degree above 1 the layer asks its ring for attention and never its
# backend. The ring refuses a backend that a user has named and that it has no kernel for: "an explicit
# request must never silently substitute". FASTVIDEO_VSA, which is sparse, is missing in its list, so
# that it is dense attention in a ring, without a warning.
# What is run is the host's own file; the rest of the host and vLLM are stood in for, and the function
# at the end, which needs a GPU, says that it was reached.
# Seen: SAGE_ATTN, CUDNN_ATTN and TRTLLM_ATTN refused, FASTVIDEO_VSA dense.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/env/bin/pip" download --quiet --no-deps --only-binary=:all: --dest "$folder" vllm-omni==0.30.0
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
import glob
import sys
import zipfile
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import torch

NAME = "vllm_omni.diffusion.attention.parallel.ring"
with zipfile.ZipFile(glob.glob("vllm_omni-*.whl")[0]) as wheel:
    source = wheel.read(NAME.replace(".", "/") + ".py")


class Loose(ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {}) if name[0].isupper() else MagicMock(name=name)


class Rest(MetaPathFinder, Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("vllm", "vllm_omni"):
            return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return Loose(spec.name)

    def exec_module(self, module):
        module.__path__ = []


sys.meta_path.insert(0, Rest())
ring = ModuleType(NAME)
sys.modules[NAME] = ring
exec(compile(source, NAME, "exec"), vars(ring))
for name in ("_can_use_fa4", "_can_use_fa3"):
    vars(ring)[name] = lambda device: False
vars(ring).update(_can_use_fa2=lambda device: True, HAS_AITER=False, AttnType=MagicMock())
import vllm_omni.diffusion.attention.backends.ring_flash_attn as kernel  # noqa: E402

kernel.ring_flash_attn_func = lambda *_, **__: "dense attention in a ring"


def asked_for(backend):
    asked = object.__new__(ring.RingParallelAttention)
    asked.attn_backend_pref, asked.attn_backend_explicit = backend, True
    asked._sp_group = SimpleNamespace(ring_group=None)
    x = torch.zeros(1, 64, 2, 64, dtype=torch.bfloat16)
    try:
        return asked.run_attention(x, x, x, None)
    except ValueError as error:
        return f"refused: {error}"


names = "SAGE_ATTN", "CUDNN_ATTN", "TRTLLM_ATTN", "FASTVIDEO_VSA"
found = {name: asked_for(name) for name in names}
for name, what in found.items():
    print(f"{name}: {what}")
refused = [name for name, what in found.items() if what.startswith("refused")]
dense = [name for name, what in found.items() if what.startswith("dense")]
assert refused == ["SAGE_ATTN", "CUDNN_ATTN", "TRTLLM_ATTN"], "it has changed"
assert dense == ["FASTVIDEO_VSA"], "it has changed"
PYTHON
