# SPDX-License-Identifier: Apache-2.0
"""``python -m vsa``."""

from vsa.cli import main

main()
