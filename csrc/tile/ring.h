// SPDX-License-Identifier: Apache-2.0
// A ring of stages. Tile loads are numbered 0, 1, 2, ... for as long as the block lives, across its
// work tiles: number n is use n / Stages of stage n % Stages.
#pragma once
#include "prim/prim.h"

namespace vsa {

template <int Stages>
struct Ring {
  // Unsigned, since division by a constant is cheaper then.
  VSA_DEVICE static int stage(int n) { return static_cast<int>(static_cast<unsigned>(n) % Stages); }
  VSA_DEVICE static int use(int n) { return static_cast<int>(static_cast<unsigned>(n) / Stages); }
};

}  // namespace vsa
