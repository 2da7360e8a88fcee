# SPDX-License-Identifier: Apache-2.0
"""``python -m vsa``."""

from video_sparse_attention import main

main()
