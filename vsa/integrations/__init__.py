# SPDX-License-Identifier: Apache-2.0
"""Video Sparse Attention inside other people's libraries, each imported only by its own package."""
