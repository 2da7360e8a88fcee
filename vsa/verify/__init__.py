# SPDX-License-Identifier: Apache-2.0
"""What results are held to: references, problems, samples in fp64. Not public."""
