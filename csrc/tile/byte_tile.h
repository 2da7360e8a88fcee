// SPDX-License-Identifier: Apache-2.0
// Tiles of 8-bit elements in shared memory, swizzled by rows of 64 or 128 bytes (prim/operand8.h),
// and their products. They are written by whoever made their image in global memory, and come as
// one copy.
#pragma once
#include "tile/fragment.h"

namespace vsa {

template <int Rows, int RowBytes>
struct alignas(kRowsAlignment<RowBytes>) ByteTile {
  static_assert(Rows % 8 == 0, "the layout repeats every eight rows");
  static constexpr int kBytes = Rows * RowBytes;

  unsigned char bytes[kBytes];

  // Where a row's byte lies in the tile.
  VSA_HD static int place(int row, int byte) {
    return static_cast<int>(swizzle_rows<RowBytes>(static_cast<uint32_t>(row * RowBytes + byte)));
  }
  VSA_DEVICE uint32_t address() const { return smem_address(bytes); }
};

// How the rows of a tile lie, for the ledger of the emulator.
template <int RowBytes>
constexpr Layout kByteLayout = RowBytes == kRowBytes ? Layout::Swizzled : Layout::Swizzled64;

// ---- products, by the whole warpgroup; wgmma_commit closes the group ----------------------------

// d = (d +) a b^T, summed over the bytes of rows. b: the descriptor of a tile's first bytes
template <class Element, int N, class T, int RowBytes>
VSA_DEVICE void mma8_ABt(Fragment<N, T>& d,
                         const Operand8<RowBytes>& a,
                         uint64_t b,
                         bool accumulate = false) {
  wgmma_fence();
  VSA_UNROLL
  for (int k = 0; k < RowBytes / kReduction8; ++k)
    wgmma8<Element>(d, a, k, advance(b, k * kReduction8), accumulate || k > 0);
}

template <class Element, int N, class T, int RowBytes>
VSA_DEVICE void mma8_ABt(Fragment<N, T>& d,
                         const Operand8<RowBytes>& a,
                         const ByteTile<N, RowBytes>& b,
                         bool accumulate = false) {
  mma8_ABt<Element>(d, a, bytes_descriptor<RowBytes>(b.address(), 0), accumulate);
}

template <class Element, int N, class T, int RowBytes>
VSA_DEVICE void mma8_ABt(Fragment<N, T>& d,
                         const ByteTile<kTileRows, RowBytes>& a,
                         const ByteTile<N, RowBytes>& b,
                         bool accumulate = false) {
  wgmma_fence();
  VSA_UNROLL
  for (int k = 0; k < RowBytes / kReduction8; ++k)
    wgmma8<Element>(d, bytes_descriptor<RowBytes>(a.address(), k),
                    bytes_descriptor<RowBytes>(b.address(), k), accumulate || k > 0);
}

// ---- operands in registers ----------------------------------------------------------------------

template <int RowBytes>
VSA_DEVICE void read_tile(Operand8<RowBytes>& a, const ByteTile<kTileRows, RowBytes>& tile) {
  note_read(&tile, sizeof tile, kByteLayout<RowBytes>);
  VSA_EACH_LANE(t) {
    auto& fours = lane(a, t);
    VSA_UNROLL
    for (int r = 0; r < RowBytes / 8; ++r)
      fours[r] = *smem_words(
          swizzle_rows<RowBytes>(tile.address() + four_row(t, r) * RowBytes + four_column(t, r)));
  }
}

// Codes of an accumulator's columns become the next product's A operand without leaving their
// lanes, which is why the reduction takes keys in the order of key_place. codes: pair p of a lane
// holds those of its accumulator registers 2 p and 2 p + 1, each in the low byte of 16 bits
VSA_DEVICE uint32_t four_codes(const uint32_t* codes, int r) {
  const int pair = r / 2 * 4 + r % 2;
  return low_bytes(codes[pair], codes[pair + 2]);
}

}  // namespace vsa
