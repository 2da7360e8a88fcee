#!/usr/bin/env bash
# FlashInfer 0.7.2 documents backend="cake_cute" of VariableBlockSparseAttentionWrapper: the kernels
# of backend="cake", written in the CuTe DSL. No wheel of 0.7.2 or 0.7.2.post1 can run it. The
# backend reads a manifest in JSON before anything else, and the wheels have all its Python files
# and not the manifest, for the package data leaves it out. With a GPU, the wrapper's plan() works
# and the first run() ends in FileNotFoundError; its own is_available() says True where the DSL is
# installed. 0.7.4 has "cake_cute" as another name of "cake". No GPU is needed to see it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
for version in 0.7.2 0.7.2.post1; do
    "$folder/env/bin/pip" install --quiet --no-deps --target "$folder/$version" \
        "flashinfer-python==$version"
    "$folder/env/bin/python" - "$folder/$version" "$version" <<'PYTHON'
import importlib.util
import sys
from pathlib import Path

package = Path(sys.argv[1], "flashinfer", "experimental", "cake_vsa_sm90_cute")
spec = importlib.util.spec_from_file_location("cake_vsa_sm90_cute", package / "__init__.py")
cute = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cute)
missing = [stage for stage in cute.STAGES if not (package / f"{stage}.py").is_file()]
assert not missing, missing  # the kernels are there
try:
    cute.load_stage("attention")  # what run() does first
except FileNotFoundError as error:
    print(f"FlashInfer {sys.argv[2]}: {len(cute.STAGES)} kernels, but no {Path(error.filename).name}")
else:
    raise SystemExit("it has changed: the wheel has a manifest")
PYTHON
done
