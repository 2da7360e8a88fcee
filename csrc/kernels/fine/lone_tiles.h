// SPDX-License-Identifier: Apache-2.0
// What a backward that makes dQ where two key tiles share a query tile leaves to its pass over
// query tiles: of each query tile the key tiles whose neighbour, in the order of work, it did not
// select.
#pragma once
#include "prim/prim.h"

namespace vsa {

struct LoneTilesParams {
  const uint32_t* bitmap;  // [batch, heads, rows, words]
  uint32_t* lone;          // the same
  const int* key_axes;     // [batch, kv_heads] along which key tiles are neighbours
  Axes tiles;              // of the keys
  int64_t count;           // words of the bitmap
  int words_of_head, words, sharing;
};

// One word of a bitmap. index: among all of them
VSA_DEVICE void find_lone_tiles(const LoneTilesParams& p, int64_t index) {
  const int axis = load_global(p.key_axes + index / p.words_of_head / p.sharing);
  const int word = static_cast<int>(index % p.words), layer = p.tiles.h * p.tiles.w;
  const uint32_t* row = p.bitmap + (index - word);
  uint32_t lone = load_global(row + word);
  for (uint32_t left = lone; left != 0; left &= left - 1) {
    const int bit = bitmap::lowest(left);
    const int place = serpentine_place(word * kWordBits + bit, axis, p.tiles.t, layer) ^ 1;
    if (place >= p.tiles.volume()) continue;
    const int other = serpentine_tile(place, axis, p.tiles.t, layer);
    if (load_global(row + other / kWordBits) >> other % kWordBits & 1) lone &= ~(1u << bit);
  }
  p.lone[index] = lone;
}

}  // namespace vsa
