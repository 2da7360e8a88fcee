// SPDX-License-Identifier: Apache-2.0
// Matrix products of 8-bit operands in the emulator, computed when they are waited for.
#pragma once
#include "prim/host_wgmma.h"

namespace vsa {
namespace host {

// Bytes that an operand spans, after checking that the descriptor describes 32 bytes of each of
// `rows` rows of one tile.
inline void read_byte_operand(uint64_t bits, int rows, bool is_a) {
  const Ledger& ledger = machine->ledger;
  const DescriptorFields at = decode(bits);
  const Label* tile = ledger.label_at(at.start);
  const auto wrong = [&](const std::string& why) {
    throw Hazard("WRONG DESCRIPTOR: " + machine->current->name + ": wgmma read of " +
                 ledger.name_of(at.start) + ": " + why);
  };
  if (tile == nullptr) wrong("no labelled tile lies there");
  if (at.swizzle != kSwizzle128 && at.swizzle != kSwizzle64)
    wrong("its swizzle is neither the one of 128 bytes nor that of 64");
  const uint32_t row_bytes = at.swizzle == kSwizzle128 ? kRowBytes : kHalfRowBytes;
  if (at.stride != 8 * row_bytes)
    wrong("groups of eight rows are " + std::to_string(8 * row_bytes) + " bytes apart, not " +
          std::to_string(at.stride));
  if (tile->begin % at.stride != 0) wrong("the tile is not aligned to the swizzle");
  const uint32_t offset = (at.start - tile->begin) % at.stride;
  if (offset >= row_bytes)
    wrong("it starts at row " + std::to_string(offset / row_bytes) + " of eight");
  if (offset % kReduction8 != 0) wrong("it starts between two steps of 32 bytes");
  const uint32_t begin = at.start - offset, bytes = static_cast<uint32_t>(rows) * row_bytes;
  if (begin + bytes > tile->end) wrong("it ends outside");
  touch_operand(begin, bytes, at.swizzle == kSwizzle128 ? Layout::Swizzled : Layout::Swizzled64,
                is_a);
}

template <class Element>
using Wide = decltype(widen(Element{}, uint8_t{}));

// An operand as numbers, [rows, 32].
template <class Element>
VSA_FAST void widen_byte_operand(uint64_t bits, int rows, Wide<Element>* out) {
  for (int row = 0; row < rows; ++row)
    for (int k = 0; k < kReduction8; ++k)
      *out++ = widen(Element{}, machine->smem[byte_operand_address(bits, row, k)]);
}

// d [64, columns] (+)= left [64, 32] times right [columns, 32] transposed
VSA_FAST inline void multiply8(Accumulator<int>& d,
                               const int* left,
                               const int* right,
                               bool accumulate) {
  for (int row = 0; row < kTileRows; ++row) {
    for (int column = 0; column < d.columns; ++column) {
      int& to = d.values[row * d.columns + column];
      int sum = accumulate ? to : 0;
      for (int k = 0; k < kReduction8; ++k)
        sum += left[row * kReduction8 + k] * right[column * kReduction8 + k];
      to = sum;
    }
  }
}
// The same for fp8, in fp32 or halves.
template <class T>
VSA_FAST void multiply8(Accumulator<T>& d, const float* left, const float* right, bool accumulate) {
  for (int row = 0; row < kTileRows; ++row) {
    for (int column = 0; column < d.columns; ++column) {
      float& to = d.values[row * d.columns + column];
      const float sum =
          sum_fp8(left + row * kReduction8, right + column * kReduction8, accumulate ? to : 0);
      to = held_sum(T{}, sum);
    }
  }
}

template <class Element, int N, class T>
constexpr bool kKnownProduct =
    std::is_same_v<Element, S8> ? std::is_same_v<T, int> && N == 64
    : std::is_same_v<T, Fp16>   ? N == 64
                                : std::is_same_v<T, float> && (N == 64 || N == 72 || N == 136);

template <class Element, class T>
void add_byte_product(Accumulator<T>& d, const Wide<Element>* left, uint64_t b, bool accumulate) {
  std::vector<Wide<Element>> right(d.columns * kReduction8);
  widen_byte_operand<Element>(b, d.columns, right.data());
  multiply8(d, left, right.data(), accumulate);
}

}  // namespace host

template <class Element, int N, class T>
void wgmma8(Fragment<N, T>& d, uint64_t a, uint64_t b, bool accumulate) {
  static_assert(host::kKnownProduct<Element, N, T>, "there is no instruction for this");
  host::read_byte_operand(a, kTileRows, true);
  host::read_byte_operand(b, N, false);
  host::start_product(d, {}, [=](host::Accumulator<T>& sums) {
    host::Wide<Element> left[kTileRows * kReduction8];
    host::widen_byte_operand<Element>(a, kTileRows, left);
    host::add_byte_product<Element>(sums, left, b, accumulate);
  });
}

template <class Element, int N, class T, int K>
void wgmma8(Fragment<N, T>& d, const Operand8<K>& a, int k32, uint64_t b, bool accumulate) {
  static_assert(host::kKnownProduct<Element, N, T>, "there is no instruction for this");
  host::read_byte_operand(b, N, false);
  const std::shared_ptr<int> borrowed = host::borrow(a);
  std::vector<host::Wide<Element>> left(kTileRows * kReduction8);
  for (int t = 0; t < kWarpgroupThreads; ++t)
    for (int r = 0; r < 4; ++r)
      for (int byte = 0; byte < 4; ++byte)
        left[four_row(t, r) * kReduction8 + four_column(t, r) + byte] =
            host::widen(Element{}, static_cast<uint8_t>(a.x[t][4 * k32 + r] >> 8 * byte));
  host::start_product(d, borrowed, [=, left = std::move(left)](host::Accumulator<T>& sums) {
    host::add_byte_product<Element>(sums, left.data(), b, accumulate);
  });
}

}  // namespace vsa
