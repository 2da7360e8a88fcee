# SPDX-License-Identifier: Apache-2.0
"""What serving programs (FastVideo, SGLang, vLLM-Omni, others) have in common with each other."""
