# SPDX-License-Identifier: Apache-2.0
"""What serving programs (FastVideo, SGLang, vLLM-Omni, others) have in common with each other."""

import video_sparse_attention
import vsa

if not hasattr(vsa, "attention"):  # the files here are ours, but the face is another's
    raise ImportError(
        video_sparse_attention.overwritten()
        or f"import vsa gives {vsa.__file__}, which is not {video_sparse_attention.DISTRIBUTION}"
    )
