// SPDX-License-Identifier: Apache-2.0
// The walk over the union of neighbouring rows of a selection: each tile of its columns once, in
// ascending order, with the rows that want it; then the columns' text, which everyone wants.
// Rows are query tiles and columns key tiles; in the transposed selection it is the other way
// round, and the same holds: text attends everything and is attended by everything.
#pragma once
#include "kernels/params.h"

namespace vsa {

template <int Rows>
class UnionWalk {
 public:
  struct Step {
    int tile;         // -1: there is no more
    uint32_t owners;  // bit r: row r wants it
  };

  // bits: [tiles of the rows' video, words] of one head. work: whose first_place is row 0
  VSA_DEVICE UnionWalk(const TiledSequence& rows,
                       const TiledSequence& columns,
                       const uint32_t* bits,
                       const Work& work)
      : columns_(columns), batch_(work.batch), words_(bitmap::words(columns.grid.num_tiles())) {
    VSA_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const int tile = tile_at(rows, work.first_place + r);
      rows_[r] = tile < 0 || rows.is_text(tile) ? nullptr : bits + int64_t{tile} * words_;
      if (tile >= 0) present_ |= 1u << r;
      if (tile >= 0 && rows.is_text(tile)) everything_ |= 1u << r;
    }
  }

  // From the start again, in a bitmap that lies `words` after this one.
  VSA_DEVICE void restart(int64_t words) {
    VSA_UNROLL
    for (int r = 0; r < Rows; ++r)
      if (rows_[r]) rows_[r] += words;
    left_ = 0;
    word_ = -1;
    text_ = 0;
  }

  VSA_DEVICE Step next() {
    while (left_ == 0 && word_ + 1 < words_) load_word(++word_);
    if (left_ != 0) {
      const int bit = bitmap::lowest(left_);
      left_ &= left_ - 1;
      uint32_t owners = 0;
      VSA_UNROLL
      for (int r = 0; r < Rows; ++r) owners |= (own_[r] >> bit & 1) << r;
      return {word_ * kWordBits + bit, owners};
    }
    // A text tile without a real token has nothing to give.
    while (text_ < columns_.text_tiles) {
      const int tile = columns_.grid.num_tiles() + text_++;
      if (columns_.rows(columns_.place(tile), batch_) != 0) return {tile, present_};
    }
    return {-1, 0};
  }

 private:
  VSA_DEVICE void load_word(int word) {
    const int bits = columns_.grid.num_tiles() - word * kWordBits;
    const uint32_t all = bits < kWordBits ? (1u << bits) - 1 : ~0u;
    left_ = 0;
    VSA_UNROLL
    for (int r = 0; r < Rows; ++r) {
      own_[r] = everything_ >> r & 1 ? all : rows_[r] ? uniform(load_global(rows_[r] + word)) : 0;
      left_ |= own_[r];
    }
  }

  const TiledSequence& columns_;
  const uint32_t* rows_[Rows];
  uint32_t own_[Rows] = {};
  uint32_t left_ = 0, present_ = 0, everything_ = 0;
  int batch_, words_, word_ = -1, text_ = 0;
};

}  // namespace vsa
