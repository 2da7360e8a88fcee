// SPDX-License-Identifier: Apache-2.0
// Facts of the tensor cores' 8-bit operands, the companion of operand.h. Constexpr functions and
// nothing else; tests/cpp/cute_oracle.cpp holds them against CuTe.
//
// Both operands lie with the reduction along their rows, which are 64 or 128 bytes: there is no
// transpose bit. So K keeps its tokens as rows, and V is stored transposed, a row for each channel.
// Rows of 128 bytes are swizzled as 16-bit ones are; of rows of 64 bytes two share a line:
//
//     rows 0, 1   0 1 2 3   4 5 6 7       chunk c of line l, of 128 bytes, lies at place
//     rows 2, 3   1 0 3 2   5 4 7 6       c ^ (l % 4)
//     rows 4, 5   2 3 0 1   6 7 4 5
//     rows 6, 7   3 2 1 0   7 6 5 4
//
// Weights go from accumulators into the A operand of the next product without leaving their thread.
// An accumulator gives a thread two neighbouring columns of every eight; the operand wants four in
// a row. So the reduction takes keys in another order: the key of column c stands at place
// key_place(c), and V's tiles are written in that order.
#pragma once
#include "prim/operand.h"

namespace vsa {

struct S8 {};    // integers from -128 to 127
struct E4m3 {};  // 4 bits of exponent, 3 of mantissa, up to 448; 0x7f and 0xff are NaN, no infinity

constexpr int kReduction8 = 32;              // elements, and bytes, that one product sums over
constexpr int kHalfRowBytes = 64;            // bytes of the shorter rows
constexpr float kMostE4m3 = 448;             // the largest number
constexpr float kMostS8 = 127;               // of either sign
constexpr float kNearestInteger = 12582912;  // 1.5 x 2^23: x + this ends in the integer next to x
constexpr float kCodeUnit = 0x1p-24f;        // what stands for a code of 1: the smallest half
// The tensor cores line up all products of a step and the accumulator, and cut off what lies so
// many bits below the largest exponent. A product has the sum of its factors' exponents, even where
// its mantissa is two or more. A sum in fp32 is then cut off so many bits below its leading bit;
// one in halves is rounded to the nearest.
constexpr int kFp8SumBits = 13;

// XOR of the chunk (bits 4 and 5 of an address) with the line (bits 7 and 8).
VSA_HD uint32_t swizzle64(uint32_t address) { return address ^ (address >> 7 & 3) << 4; }

// The layout of rows of 64 or 128 bytes.
template <int RowBytes>
VSA_HD uint32_t swizzle_rows(uint32_t address) {
  static_assert(RowBytes == kHalfRowBytes || RowBytes == kRowBytes);
  return RowBytes == kRowBytes ? swizzle128(address) : swizzle64(address);
}
// Tiles are aligned to this: eight rows.
template <int RowBytes>
constexpr int kRowsAlignment = 8 * RowBytes;

// A operand in registers: register r of a thread holds (row, column) to (row, column + 3).
VSA_HD int four_row(int thread, int r) { return accumulator_row(thread, 2 * r); }
VSA_HD int four_column(int thread, int r) {
  return r / 4 * kReduction8 + r / 2 % 2 * 16 + thread % 4 * 4;
}

// Where along the reduction the key of an accumulator's column stands.
VSA_HD int key_place(int column) {
  return column / 16 * 16 + column / 2 % 4 * 4 + column / 8 % 2 * 2 + column % 2;
}
// The inverse.
VSA_HD int key_at(int place) {
  return place / 16 * 16 + place / 2 % 2 * 8 + place / 4 % 4 * 2 + place % 2;
}

// Matrix descriptor of 32 bytes of every row of a tile, from byte 32 k32 on.
template <int RowBytes>
VSA_HD uint64_t bytes_descriptor(uint32_t tile_address, int k32) {
  constexpr uint32_t kSwizzle = RowBytes == kRowBytes ? kSwizzle128 : kSwizzle64;
  return advance(descriptor(tile_address, kChunkBytes, kRowsAlignment<RowBytes>, kSwizzle),
                 k32 * kReduction8);
}

// Address that a product reads for byte (outer, inner) of an operand, inner < 32.
VSA_HD uint32_t byte_operand_address(uint64_t descriptor, int outer, int inner) {
  const DescriptorFields at = decode(descriptor);
  const uint32_t linear = at.start + outer / 8 * at.stride + outer % 8 * (at.stride / 8) + inner;
  return at.swizzle == kSwizzle128 ? swizzle128(linear) : swizzle64(linear);
}

namespace facts {

static_assert(swizzle64(swizzle64(0x1fff0)) == 0x1fff0, "the swizzle is its own inverse");
static_assert(four_row(127, 15) == 63 && four_column(127, 15) == 124,
              "the last thread holds the last fours");

// The order of keys makes an operand of an accumulator: each byte of each register, in its thread.
VSA_HD bool keys_stay_in_their_threads() {
  for (int thread = 0; thread < kWarpgroupThreads; ++thread)
    for (int r = 0; r < kTileRows / 8; ++r)
      for (int byte = 0; byte < 4; ++byte) {
        // Groups of eight columns 2 (r / 2) and the next one, row r % 2 of the thread.
        const int i = (r / 2 * 2 + byte / 2) * 4 + r % 2 * 2 + byte % 2;
        if (accumulator_row(thread, i) != four_row(thread, r)) return false;
        if (key_place(accumulator_column(thread, i)) != four_column(thread, r) + byte) return false;
      }
  for (int key = 0; key < kTileRows; ++key)
    if (key_at(key_place(key)) != key) return false;
  return true;
}
static_assert(keys_stay_in_their_threads());

}  // namespace facts

}  // namespace vsa
