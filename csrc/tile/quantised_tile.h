// SPDX-License-Identifier: Apache-2.0
// A tile of keys and values in eight bits, as it lies in a stage of a ring and, without the end
// that aligns the next one, as an image in global memory: one copy brings all of it.
//
//   k       rows of tokens; one that is no token holds another token of the tile, so that a row's
//           largest score needs no mask
//   v       rows of channels, keys in the order of key_place, zeros where there is no token. Behind
//           the channels stand eight rows, of which the first is 1 for every token and 0 elsewhere:
//           column D of weights times values is the sum of the tokens' weights
//   scale   of k; NaN where a key is infinite or NaN
#pragma once
#include "tile/byte_tile.h"

namespace vsa {

constexpr int kSumRows = 8;  // as few as there can be
// The largest magnitude of operands of scores. 128 products of 16 x 16 stay below the largest half.
template <class Key>
constexpr float kMostScored = std::is_same_v<Key, S8> ? kMostS8 : 16;
// Tiles, channels and queries whose numbers are all smaller than this are taken for zeros.
constexpr float kLeastMagnitude = 0x1p-100f;

template <int D>
struct alignas(kRowsAlignment<D>) QuantisedTile {
  ByteTile<kTileRows, D> k;
  ByteTile<D + kSumRows, kHalfRowBytes> v;
  alignas(kChunkBytes) float scale;

  // A copy moves granules of 16 bytes.
  static constexpr int kImageBytes = static_cast<int>(sizeof k + sizeof v) + kChunkBytes;
};

// Bytes of the image of a tile of D channels, for those who allocate.
VSA_HD int quantised_tile_bytes(int head_dim) {
  return head_dim == 64 ? QuantisedTile<64>::kImageBytes : QuantisedTile<128>::kImageBytes;
}

}  // namespace vsa
