# SPDX-License-Identifier: Apache-2.0
"""Runs a compiler, and keeps what it says of FILE.cu in FOLDER/FILE.cu.txt: VSA_KEEP of setup.py.

usage: python third_party/keep_said.py FOLDER COMPILER ARGUMENTS...
"""

import subprocess
import sys
from pathlib import Path

folder, *command = sys.argv[1:]
done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
sys.stdout.write(done.stdout)
for source in (Path(word) for word in command if word.endswith(".cu")):
    Path(folder, f"{source.name}.txt").write_text(done.stdout)
sys.exit(done.returncode)
