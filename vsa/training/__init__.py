# SPDX-License-Identifier: Apache-2.0
"""A small video model trained by rectified flow: what ``vsa train`` runs.

Not part of the public interface: a recipe to repeat and to compare kinds of attention by. The model
works on pixels, since no autoencoder for video comes with an installable package.
"""
