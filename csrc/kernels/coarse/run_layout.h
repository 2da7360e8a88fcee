// SPDX-License-Identifier: Apache-2.0
// How the means of runs lie between the kernel that makes them and the one that multiplies them.
//
// A tile has `slots` rows of fp16 channels, one per run: 4, 8 or 16, in quads of four. A slot
// without a run is empty. Each row is scaled by a power of two, so that its largest number is in
// [2^14, 2^15): fp16 then has eleven bits of it, whatever the range of the input. The factor that
// undoes this is kept beside the row, and is negative for an empty slot, whose row is zeros.
//
//   queries   [matrix, tile, slot] rows, in plain order; factors likewise
//   keys      [matrix, block]: images of a tile in shared memory (operand.h), 16 quads each, so
//   that
//             a contiguous copy is all it takes; factors [matrix, block, quad of a lane, lane,
//             slot]
//
// The order of rows in a block of keys gives the four columns of a quad to one lane of the
// accumulator: lane l of a quad of lanes has columns 8 i + 2 l and 8 i + 2 l + 1 for all i, so
// its quad k is made of those with i = 2 k and 2 k + 1. A lane has four quads, and all quads of a
// tile where that has several. Queries need no such order: lanes load their own rows.
//
//   column    0  1  2  3  4  5  6  7   8  9 10 11 12 13 14 15  16 ..
//   of tile   0  0  1  1  2  2  3  3   0  0  1  1  2  2  3  3   4 ..    with 4 slots
#pragma once
#include "prim/operand.h"

namespace vsa::runs {

constexpr int kQuad = 4;                                 // slots of a quad
constexpr int kBlockQuads = kTileRows / kQuad;           // in a block of keys
constexpr int kLanes = 4;                                // that share the columns of a row
constexpr int kLaneQuads = kBlockQuads / kLanes;         // of a block, in each of these
constexpr int kGroupQuads = kWarpgroupThreads / kLanes;  // of queries, in a warpgroup

VSA_HD int block_tiles(int slots) { return kTileRows / slots; }
VSA_HD int key_blocks(int tiles, int slots) { return ceil_div(tiles, block_tiles(slots)); }

// Which quad of which lane a quad of a tile is, both of a block.
struct LaneQuad {
  int lane, quad;
};
VSA_HD LaneQuad lane_quad(int tile, int slot, int slots) {
  return {tile % kLanes, tile / kLanes * (slots / kQuad) + slot / kQuad};
}
// The tile of a block that a lane's quad belongs to.
VSA_HD int tile_of(LaneQuad at, int slots) { return at.quad / (slots / kQuad) * kLanes + at.lane; }

// Row of a block of keys, and place among its factors.
VSA_HD int key_row(int tile, int slot, int slots) {
  const LaneQuad at = lane_quad(tile, slot, slots);
  const int of_quad = slot % kQuad;
  return 16 * at.quad + of_quad / 2 * 8 + 2 * at.lane + of_quad % 2;
}
VSA_HD int factor_place(LaneQuad at, int of_quad) {
  return (at.quad * kLanes + at.lane) * kQuad + of_quad;
}

// Register of half an accumulator (rows of slots 0 and 1 of queries, or of 2 and 3) that holds the
// product of slot u of a lane's quad of queries with slot v of its quad k of keys.
VSA_HD int product_register(int u, int k, int v) { return (2 * k + v / 2) * 4 + u % 2 * 2 + v % 2; }

// Byte of a channel in an image of D channels.
VSA_HD int64_t image_byte(int row, int channel) {
  return int64_t{channel / kPanelChannels} * kPanelBytes +
         swizzle128(
             static_cast<uint32_t>(row * kRowBytes + channel % kPanelChannels * kElementBytes));
}

// The scale of a row whose largest number has this biased exponent, and what undoes it: powers of
// two as the bits of floats. Rows of zeros, subnormals, infinities and NaN take the nearest.
constexpr int kExponentBits = 23;  // bits below the exponent
VSA_HD int clamped_exponent(int exponent) {
  return exponent < 15 ? 15 : exponent > 254 ? 254 : exponent;
}
VSA_HD int scale_bits(int exponent) { return (268 - clamped_exponent(exponent)) << kExponentBits; }
VSA_HD int factor_bits(int exponent) { return (clamped_exponent(exponent) - 14) << kExponentBits; }

static_assert(key_row(3, 3, 4) == 15 && key_row(4, 0, 4) == 16 && key_row(1, 4, 8) == 18);
static_assert(tile_of(lane_quad(6, 5, 8), 8) == 6 && tile_of(lane_quad(2, 15, 16), 16) == 2);
static_assert(accumulator_column(2, product_register(3, 1, 2)) == key_row(6, 2, 4) &&
                  accumulator_row(0, product_register(3, 1, 2)) == 8,
              "a product lies where its rows do");
static_assert(scale_bits(127 + 3) == (127 + 11) << kExponentBits, "8 becomes 2^14");
static_assert((scale_bits(130) >> kExponentBits) + (factor_bits(130) >> kExponentBits) == 254,
              "one undoes the other");

}  // namespace vsa::runs
