// SPDX-License-Identifier: Apache-2.0
// The walk over the union of neighbouring rows of a selection: each key tile once, in ascending
// order, with the rows that want it; then the text, which everyone wants.
#pragma once
#include "kernels/params.h"

namespace vsa {

template <int Rows>
class UnionWalk {
 public:
  struct Step {
    int tile;         // -1: there is no more
    uint32_t owners;  // bit r: row r attends it
  };

  VSA_DEVICE UnionWalk(const FineForwardParams& p, const Work& work) : p_(p), batch_(work.batch) {
    VSA_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const int tile = query_tile(p.queries, work.first_tile + r);
      const int64_t row = (int64_t{work.batch} * p.heads + work.head) * p.queries.grid.num_tiles();
      rows_[r] =
          tile < 0 || p.queries.is_text(tile) ? nullptr : p.selected + (row + tile) * p.words();
      if (tile >= 0) present_ |= 1u << r;
      if (tile >= 0 && p.queries.is_text(tile)) everything_ |= 1u << r;
    }
  }

  VSA_DEVICE Step next() {
    const int columns = p_.keys.grid.num_tiles();
    while (left_ == 0 && word_ + 1 < p_.words()) load_word(++word_, columns);
    if (left_ != 0) {
      const int bit = bitmap::lowest(left_);
      left_ &= left_ - 1;
      uint32_t owners = 0;
      VSA_UNROLL
      for (int r = 0; r < Rows; ++r) owners |= (own_[r] >> bit & 1) << r;
      return {word_ * kWordBits + bit, owners};
    }
    // A text tile without a real token has nothing to attend.
    while (text_ < p_.keys.text_tiles) {
      const int tile = columns + text_++;
      if (p_.keys.rows(p_.keys.place(tile), batch_) != 0) return {tile, present_};
    }
    return {-1, 0};
  }

 private:
  VSA_DEVICE void load_word(int word, int columns) {
    const int bits = columns - word * kWordBits;
    const uint32_t all = bits < kWordBits ? (1u << bits) - 1 : ~0u;
    left_ = 0;
    VSA_UNROLL
    for (int r = 0; r < Rows; ++r) {
      own_[r] = everything_ >> r & 1 ? all : rows_[r] ? load_global(rows_[r] + word) : 0;
      left_ |= own_[r];
    }
  }

  const FineForwardParams& p_;
  const uint32_t* rows_[Rows];
  uint32_t own_[Rows] = {};
  uint32_t left_ = 0, present_ = 0, everything_ = 0;
  int word_ = -1, text_ = 0, batch_;
};

}  // namespace vsa
