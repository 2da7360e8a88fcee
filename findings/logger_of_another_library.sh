#!/usr/bin/env bash
# diffusers 0.42.1 calls logger.warning_once in its context parallelism (hooks/context_parallel.py)
# and in bitsandbytes' quantizer, on loggers of Python's logging, which have no such method. It
# exists once transformers has been imported: that library sets it on logging.Logger, for the whole
# process. So a transformer of Wan whose inputs deserve that warning (a timestep of one dimension)
# runs in parallel inside a pipeline, which imports text encoders, and ends with an AttributeError
# where the transformer alone is used, as in training and in benchmarks.
# Seen: AttributeError before, a warning after import of transformers 5.24.0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy diffusers==0.42.1 transformers==5.24.0
"$folder/env/bin/python" - <<'PYTHON'
import logging
import sys

import diffusers
from diffusers.hooks import context_parallel

assert "transformers.utils.logging" not in sys.modules, "it has changed: diffusers imports it"
assert type(context_parallel.logger) is logging.Logger, "it has changed"
try:
    context_parallel.logger.warning_once("split will not be applied")
except AttributeError as error:
    print(diffusers.__version__, "alone:", error)
else:
    raise SystemExit("it has changed: no error")

import transformers.utils.logging  # noqa: E402  what is shown is what it changes

context_parallel.logger.warning_once("split will not be applied")
print("after import of transformers", transformers.__version__, "it is there, on logging.Logger:")
assert hasattr(logging.getLogger("anything"), "warning_once"), "it has changed"
PYTHON
