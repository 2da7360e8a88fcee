"""``python -m vsa``."""

from vsa.cli import main

main()
