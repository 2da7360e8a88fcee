// SPDX-License-Identifier: Apache-2.0
// Rows of a bitmap whose columns are chunks of equally many key tiles, with the chunks in another
// order: from that of time to that of slots in a cache, or back. A lane makes a word.
//
//   target[row][chunk] = source[row][order[chunk]]
#pragma once
#include "prim/warp.h"

namespace vsa {

struct ReorderBitmapParams {
  const uint32_t* source;  // [rows, words]
  uint32_t* target;        // the same
  const int64_t* order;    // [chunks]
  int columns, per_chunk;
  int64_t lanes;  // rows * words
};

struct ReorderBitmap {
  using Params = ReorderBitmapParams;

  VSA_DEVICE static void run(const Params& p, int64_t lane) {
    const int words = bitmap::words(p.columns);
    const int word = static_cast<int>(lane % words);
    const uint32_t* source = p.source + (lane - word);
    const int begin = word * kWordBits, left = p.columns - begin;
    const int end = begin + (left < kWordBits ? left : kWordBits);
    uint32_t bits = 0;
    for (int at = begin; at < end;) {  // columns of one chunk
      const int chunk = at / p.per_chunk, place = at - chunk * p.per_chunk;
      const int to_end = end - at, in_chunk = p.per_chunk - place;
      const int count = in_chunk < to_end ? in_chunk : to_end;
      const int from = static_cast<int>(load_global(p.order + chunk)) * p.per_chunk + place;
      bits |= some_bits(source, from, count) << (at - begin);
      at += count;
    }
    p.target[lane] = bits;
  }

 private:
  // `count` bits from a column on, 1 to 32 of them.
  VSA_DEVICE static uint32_t some_bits(const uint32_t* row, int column, int count) {
    const int word = column / kWordBits, shift = column % kWordBits;
    uint64_t bits = load_global(row + word);
    if (shift + count > kWordBits) bits |= uint64_t{load_global(row + word + 1)} << kWordBits;
    return static_cast<uint32_t>(bits >> shift) & (~0u >> (kWordBits - count));
  }
};

}  // namespace vsa
