# SPDX-License-Identifier: Apache-2.0
"""What is passed around: grids, bitmaps, budgets, and the checks of each. Not public."""
