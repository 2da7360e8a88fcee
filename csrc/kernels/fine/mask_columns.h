// SPDX-License-Identifier: Apache-2.0
// Scores of keys that are left out of a softmax.
#pragma once
#include <cmath>

#include "tile/fragment.h"

namespace vsa {

// Keys that are no tokens get no weight. The mask is the same for the whole warpgroup, so a tile
// that is whole costs one branch.
VSA_DEVICE void mask_columns(Fragment<64>& scores, uint64_t rows) {
  if (rows != ~uint64_t{0}) fill_columns(scores, rows, -INFINITY);
}

}  // namespace vsa
