# SPDX-License-Identifier: Apache-2.0
"""Run a module of FastVideo after ``install``: ``python -m vsa.integrations.fastvideo.run MODULE``.

What follows MODULE is what that module gets as its command line.
"""

from __future__ import annotations

import runpy
import sys

from vsa.integrations.fastvideo.setup import install

install()

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("MODULE is missing: for example fastvideo.entrypoints.cli.main generate --help")
    del sys.argv[0]
    # Not in the place of __main__, which is what a worker imports.
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=False)
