// SPDX-License-Identifier: Apache-2.0
// Columns that are key tiles of a ring of slots, and the order in which time has them. The first
// slots stay; in the others a new chunk takes the place of the oldest. So time has the columns up
// to the ring, those from its oldest chunk on, and last the columns before that one.
#pragma once
#include "kernels/select/tile_rule.h"

namespace vsa {

struct TimeOrder {
  const int64_t* oldest;  // [1] slot of the ring's oldest chunk; null: columns are in order
  int ring;               // column that the ring begins at
  int per_slot;           // columns of a slot

  VSA_DEVICE bool known() const { return oldest != nullptr; }
  // Columns that come last.
  VSA_DEVICE Run last() const { return {ring, static_cast<int>(load_global(oldest)) * per_slot}; }

  // The bits of a bitmap's word that stand for columns of a run.
  VSA_DEVICE static uint32_t bits_of(Run run, int word) {
    const auto below = [=](int column) {
      const int bits = column - word * kWordBits;
      return bits <= 0 ? 0u : bits >= kWordBits ? ~0u : (1u << bits) - 1;
    };
    return below(run.after) & ~below(run.first);
  }
};

}  // namespace vsa
