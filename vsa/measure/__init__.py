# SPDX-License-Identifier: Apache-2.0
"""Time, memory and layers of models, for the command line and bench/. Not public."""
