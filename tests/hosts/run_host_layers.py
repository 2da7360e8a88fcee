# SPDX-License-Identifier: Apache-2.0
"""Run the hosts' own VSA layers on a CPU, with our kernels below them and by our integrations.

python tests/hosts/run_host_layers.py --folder FOLDER downloads the pinned wheels and imports the
files of the layers from them; what these import from the rest of a host is loose. Each output is
compared with what the layer is to compute, in fp64. It needs a network, and is no part of CI.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hosts import run_fastvideo, run_sglang, run_sglang_h3, run_vllm_omni, run_xdit

RUNS = {
    "fastvideo": run_fastvideo.run,
    "sglang": run_sglang.run,
    "sglang-h3": run_sglang_h3.run,
    "vllm-omni": run_vllm_omni.run,
    "xfuser": run_xdit.run,
}


def main() -> None:
    """Run, print a line for each, and fail where one is off."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where wheels are kept; else a temporary one")
    parser.add_argument("--host", choices=sorted(RUNS), action="append")
    options = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as temporary:
        for host in options.host or RUNS:
            for found in RUNS[host](options.folder or Path(temporary)):
                wrong += not found.error <= found.limit
                print(f"{host}: {found.name}: {found.error:.1e} of at most {found.limit:.0e}")
    if wrong:
        raise SystemExit(f"{wrong} outputs are off")


if __name__ == "__main__":
    main()
