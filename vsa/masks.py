# SPDX-License-Identifier: Apache-2.0
"""Masks over tiles: which key tiles a query tile may choose, as ``mask=`` takes them."""

from vsa.values.masks import ChunkCausal, Mask, TeacherForcing, Window

__all__ = ["ChunkCausal", "Mask", "TeacherForcing", "Window"]
