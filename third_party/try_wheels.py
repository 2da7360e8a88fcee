#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Installs wheels beside several releases of torch in fresh environments, and runs them on a CPU.

    python third_party/try_wheels.py dist 3.10:2.9.1 3.12:2.11.0 3.13:2.13.0

Each pair is a Python and a torch. Of each: import without a warning, attention and its gradients on
the emulator equal to PyTorch's, `vsa info`. Prints a table, and fails if one of them fails.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
from pathlib import Path

from make_wheels import interpreter

TRIAL = """
import json, platform, warnings
import torch
warnings.simplefilter("error")
import vsa
warnings.simplefilter("default")

worst = 0.0
for grid, head_dim in (((4, 8, 8), 64), ((3, 5, 7), 128)):
    torch.manual_seed(0)
    leaves = [torch.randn(1, *grid, 2, head_dim).bfloat16().requires_grad_() for _ in range(3)]
    results = []
    for name in ("emulated", "torch"):
        out = vsa.attention(*leaves, 2, backend=name)
        results.append([out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=4e-2)
        worst = max(worst, (found.float() - wanted.float()).abs().max().item())
print(json.dumps({
    "python": platform.python_version(), "torch": torch.__version__, "worst": f"{worst:.1e}",
    "vsa": vsa.__version__,
}))
"""


def trial(wheels: Path, version: str, torch: str) -> dict[str, str]:
    """What one fresh environment says.

    Raises:
        SystemExit: no wheel of this Python, or a step that fails.
    """
    tag = f"cp{version.replace('.', '')}"
    found = sorted(wheels.glob(f"*-{tag}-{tag}-*.whl"))
    if len(found) != 1:
        raise SystemExit(f"vsa: {wheels} holds {len(found)} wheels of Python {version}")
    with tempfile.TemporaryDirectory() as scratch:
        bin = Path(scratch, "env", "bin")

        def step(*command: object) -> str:
            words = [str(word) for word in command]
            done = subprocess.run(words, cwd=scratch, capture_output=True, text=True)
            if done.returncode != 0:
                said = (done.stdout + done.stderr)[-4000:]
                raise SystemExit(f"{said}\nvsa: Python {version}, torch {torch}: a step failed")
            return done.stdout

        step(interpreter(version), "-m", "venv", "env")
        step(bin / "pip", "install", "--quiet", f"torch=={torch}", "numpy")
        step(bin / "pip", "install", "--quiet", found[0])
        facts = json.loads(step(bin / "python", "-c", TRIAL).splitlines()[-1])
        info = step(bin / "vsa", "info")
        part = next(line for line in info.splitlines() if line.startswith("compiled part"))
    return {**facts, "wheel": found[0].name, "compiled": part.removeprefix("compiled part").strip()}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheels", type=Path, help="folder with the wheels")
    parser.add_argument("pairs", nargs="+", metavar="PYTHON:TORCH", help="such as 3.12:2.11.0")
    given = parser.parse_args()
    rows = []
    for pair in given.pairs:
        rows.append(trial(given.wheels.absolute(), *pair.split(":")))
        print(json.dumps(rows[-1]), flush=True)
    print(f"\nglibc {platform.libc_ver()[1]}, vsa {rows[0]['vsa']}\n")
    print("| Python | PyTorch | wheel | compiled part | largest difference |")
    print("| --- | --- | --- | --- | --- |")
    for row in rows:
        cells = row["python"], row["torch"], f"`{row['wheel']}`", row["compiled"], row["worst"]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
