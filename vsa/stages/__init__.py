# SPDX-License-Identifier: Apache-2.0
"""coarse -> select -> fine -> combine, and the inputs that all of them take. Not public."""
