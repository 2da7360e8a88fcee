#!/usr/bin/env bash
# FlashInfer 0.7.4, backend="cake" of VariableBlockSparseAttentionWrapper: Hopper kernels for the
# 64x64 tiles of Video Sparse Attention, with a planner that plan() runs on the host whenever the
# mask changes, which it does in every layer and step where tiles are chosen by the queries. The
# planner is a loop over tiles in Python: for 12 heads of 32,768 tokens with 64 of 512 tiles in
# each row it takes seconds, where the attention that it plans takes a millisecond or two.
# Seen: seconds of processor time on one core, in proportion to the heads. No GPU is needed to see it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy apache-tvm-ffi==0.1.15.post2
"$folder/env/bin/pip" download --quiet --no-deps --dest "$folder" flashinfer-python==0.7.4
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
import glob
import sys
import time
import zipfile

import torch

with zipfile.ZipFile(glob.glob("flashinfer_python-*.whl")[0]) as wheel:
    package = "flashinfer/cake_vsa_sm90_backend/"  # it says that it can be used without the rest
    wheel.extractall(members=[name for name in wheel.namelist() if name.startswith(package)])
sys.path.insert(0, "flashinfer")
from cake_vsa_sm90_backend.cake_planner import plan_vsa_sm90

torch.set_num_threads(1)
tiles, chosen = 512, 64
seconds = {}
for heads in (1, 12):
    scores = torch.rand(heads, tiles, tiles, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(heads, tiles, tiles, dtype=torch.bool)
    mask.scatter_(-1, scores.topk(chosen).indices, True)
    begin = time.process_time()
    plan = plan_vsa_sm90(mask, sms=132)
    seconds[heads] = time.process_time() - begin
    print(f"{heads} heads, {tiles} x {tiles} tiles, {chosen} in a row: planned for "
          f"{plan['num_ctas']} blocks in {seconds[heads]:.2f} s")
assert seconds[12] > 0.5 and seconds[12] > 4 * seconds[1], "it has changed"
PYTHON
