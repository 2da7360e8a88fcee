// SPDX-License-Identifier: Apache-2.0
// Facts of the Hopper tensor cores that both backends share: where a swizzle puts a byte, which
// element a register of a fragment holds, what the bits of a matrix descriptor say. Constexpr
// functions, nothing else; tests/cpp/cute_oracle.cpp holds them against CuTe.
//
// An operand in shared memory is a tile: 64 rows of D 16-bit channels, cut into D / 64 panels. A
// panel is 64 rows of 128 bytes whose 16-byte chunks are permuted within each row:
//
//     row 0   0 1 2 3 4 5 6 7       chunk c of row r lies at place c ^ (r % 8), so that eight rows
//     row 1   1 0 3 2 5 4 7 6       of one chunk meet eight different groups of banks
//     row 2   2 3 0 1 6 7 4 5
#pragma once
#include <cstdint>

#include "prim/facts.h"

namespace vsa {

struct Bf16 {};  // element tags: what the 16 bits of a channel mean
struct Fp16 {};

// How bytes lie in shared memory; Any where it makes no difference, as for zeros, or where a copy
// brings parts that lie differently.
enum class Layout { Any, Linear, Swizzled, Swizzled64 };

constexpr int kWarpThreads = 32;
constexpr int kWarpgroupThreads = 128;
constexpr int kPanelChannels = 64;                  // channels of a swizzled row
constexpr int kRowBytes = 128;                      // bytes of a swizzled row
constexpr int kPanelBytes = kTileRows * kRowBytes;  // 8 KiB
constexpr int kSwizzleBytes = 8 * kRowBytes;        // the pattern repeats: panels align to this
constexpr int kReduction = 16;                      // elements that one wgmma sums over
constexpr int kSharedBytes = 227 * 1024;            // shared memory that one block may use
constexpr int kChunkBytes = 16;                     // what the swizzle moves as one
constexpr int kElementBytes = 2;                    // of Bf16 and Fp16
constexpr int kChunkElements = kChunkBytes / kElementBytes;

struct alignas(kChunkBytes) Chunk {
  uint32_t pairs[kChunkElements / 2];
};

struct alignas(8) FloatPair {
  float x, y;
};

struct alignas(kChunkBytes) FloatFour {
  float x[4];
};

// Registers per thread that a block of so many threads is launched with: they come in eights.
VSA_HD int launch_registers(int threads) { return 65536 / threads / 8 * 8; }

// Whether a kernel's blocks have a reducer, and what registers per thread that takes.
template <class Kernel>
VSA_HD bool has_reducer() {
  return requires { Kernel::kReducerRegisters; };
}
template <class Kernel>
VSA_HD int reducer_registers() {
  if constexpr (has_reducer<Kernel>()) return Kernel::kReducerRegisters;
  return 0;
}

// XOR of the chunk (bits 4..6 of an address) with the row (bits 7..9).
VSA_HD uint32_t swizzle128(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// Accumulator of m64nN: register i of a thread of the warpgroup holds (row, column). A warp has 16
// rows; four neighbouring threads, a quad, share rows r and r + 8.
VSA_HD int accumulator_row(int thread, int i) {
  return thread / 32 * 16 + thread % 32 / 4 + 8 * (i >> 1 & 1);
}
VSA_HD int accumulator_column(int thread, int i) { return (i >> 2) * 8 + thread % 4 * 2 + (i & 1); }

// A operand in registers: pair r of a thread holds (row, column) and (row, column + 1). It is the
// accumulator's map at i = 2r, so an accumulator rounded to pairs is the next product's operand.
VSA_HD int pair_row(int thread, int r) { return accumulator_row(thread, 2 * r); }
VSA_HD int pair_column(int thread, int r) { return accumulator_column(thread, 2 * r); }

// How a descriptor calls the swizzle of rows of 128 bytes, and of rows of 64 (operand8.h).
constexpr uint32_t kSwizzle128 = 1, kSwizzle64 = 2;

// Matrix descriptor of an operand; bytes. The low word holds the start, so that stepping through a
// tile is one 32-bit addition of a constant.
VSA_HD uint64_t descriptor(uint32_t address,
                           uint32_t leading,
                           uint32_t stride,
                           uint32_t swizzle = kSwizzle128) {
  const uint32_t low = (address & 0x3ffff) >> 4 | (leading & 0x3ffff) >> 4 << 16;
  const uint32_t high = (stride & 0x3ffff) >> 4 | swizzle << 30;
  return uint64_t{high} << 32 | low;
}
VSA_HD uint64_t advance(uint64_t start, uint32_t bytes) {
  return (start & ~uint64_t{0xffffffff}) | (static_cast<uint32_t>(start) + (bytes >> 4));
}

// Channels [16 k16, 16 k16 + 16) of a tile whose reduction axis is the channels: both operands of
// Q K^T. The leading offset is not used with this swizzle.
VSA_HD uint64_t channels_descriptor(uint32_t tile_address, int k16) {
  return advance(descriptor(tile_address, kChunkBytes, kSwizzleBytes),
                 k16 / 4 * kPanelBytes + k16 % 4 * kReduction * 2);
}
// Rows [16 k16, 16 k16 + 16) of a tile whose reduction axis is the rows, which takes the transpose
// bit: V in P V. The leading offset leads from panel to panel.
VSA_HD uint64_t rows_descriptor(uint32_t tile_address, int k16) {
  return advance(descriptor(tile_address, kPanelBytes, kSwizzleBytes),
                 k16 * kReduction * kRowBytes);
}

struct DescriptorFields {
  uint32_t start, leading, stride;  // bytes
  uint32_t swizzle;                 // kSwizzle128 or kSwizzle64
};
VSA_HD DescriptorFields decode(uint64_t bits) {
  return {static_cast<uint32_t>(bits & 0x3fff) << 4,
          static_cast<uint32_t>(bits >> 16 & 0x3fff) << 4,
          static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4, static_cast<uint32_t>(bits >> 62)};
}

// Address that wgmma reads for element (outer, inner) of an operand, inner < 16 along the
// reduction.
VSA_HD uint32_t operand_address(uint64_t descriptor, bool transposed, int outer, int inner) {
  const DescriptorFields at = decode(descriptor);
  if (transposed)
    return swizzle128(at.start + outer / 64 * at.leading + inner / 8 * at.stride +
                      inner % 8 * kRowBytes + outer % 64 * 2);
  return swizzle128(at.start + outer / 8 * at.stride + outer % 8 * kRowBytes + inner * 2);
}

// Coordinates of a box in a five-axis tensor map, elements, innermost first.
struct BoxCoordinates {
  int channel, w, h, t, outer;
};

// What the L2 cache should do with the lines of a copy, in the hardware's encoding of policies.
enum class CacheHint : uint64_t {
  Normal = 0x1000000000000000,
  EvictFirst = 0x12f0000000000000,
  EvictLast = 0x14f0000000000000,
};

// The rules above, where a slip would not show until a GPU computes nonsense.
namespace facts {

static_assert(launch_registers(384) == 168 && launch_registers(512) == 128,
              "three warpgroups share 504 registers per thread, four share 512");
static_assert(swizzle128(swizzle128(0x1fff0)) == 0x1fff0, "the swizzle is its own inverse");
static_assert(accumulator_row(127, 2) == 63 && accumulator_column(127, 31) == 63,
              "the last thread holds the last row and column");
static_assert(accumulator_column(127, 31) == accumulator_column(127, 0) + accumulator_column(0, 31),
              "a lane's columns are as far from its first as lane 0's are");
static_assert(channels_descriptor(0x20000, 5) ==
                  descriptor(0x20000 + kPanelBytes + 32, kChunkBytes, kSwizzleBytes),
              "stepping a descriptor is making it at the later address");
static_assert(rows_descriptor(0x37c00, 3) ==
                  descriptor(0x37c00 + 48 * kRowBytes, kPanelBytes, kSwizzleBytes),
              "the start of the last tile does not carry into the leading offset");

}  // namespace facts

}  // namespace vsa
