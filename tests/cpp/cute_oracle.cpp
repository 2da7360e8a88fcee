// SPDX-License-Identifier: Apache-2.0
// prim/operand.h and prim/operand8.h against CuTe: fragment maps, swizzles, operand addresses,
// descriptor bits.
// Prints the number of differences.
#include <cstdint>
#include <cstdio>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include "prim/operand8.h"

namespace {

using namespace cute;  // NOLINT: the oracle's own notation

// CuTe numbers an element of a fragment row + 64 * column.
template <int N>
int accumulators() {
  const auto layout = SM90::GMMA::CLayout_64xN<N>{};
  int wrong = 0;
  for (int t = 0; t < vsa::kWarpgroupThreads; ++t)
    for (int i = 0; i < N / 2; ++i)
      wrong += layout(t, i) != vsa::accumulator_row(t, i) + 64 * vsa::accumulator_column(t, i);
  return wrong;
}

int a_operands() {
  const auto layout = SM90::GMMA::ALayout_64x16{};
  int wrong = 0;
  for (int t = 0; t < vsa::kWarpgroupThreads; ++t)
    for (int i = 0; i < 8; ++i)
      wrong += layout(t, i) != vsa::pair_row(t, i / 2) + 64 * (vsa::pair_column(t, i / 2) + i % 2);
  return wrong;
}

int byte_operands() {
  const auto layout = SM90::GMMA::ALayout_64x32{};
  int wrong = 0;
  for (int t = 0; t < vsa::kWarpgroupThreads; ++t)
    for (int i = 0; i < 16; ++i)
      wrong += layout(t, i) != vsa::four_row(t, i / 4) + 64 * (vsa::four_column(t, i / 4) + i % 4);
  return wrong;
}

int swizzles() {
  int wrong = 0;
  for (int address = 0; address < 1 << 18; ++address) {
    wrong += Swizzle<3, 4, 3>{}(address) != static_cast<int>(vsa::swizzle128(address));
    wrong += Swizzle<2, 4, 3>{}(address) != static_cast<int>(vsa::swizzle64(address));
  }
  return wrong;
}

// A tile as CuTe lays it out, (row, channel) and (channel, row).
template <int D>
auto by_channels() {
  return tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<bfloat16_t>{}, Shape<_64, Int<D>>{});
}
template <int D>
auto by_rows() {
  return tile_to_shape(SM90::GMMA::Layout_MN_SW128_Atom<bfloat16_t>{}, Shape<Int<D>, _64>{},
                       Step<_2, _1>{});
}

template <int D>
int addresses() {
  const auto channels = as_position_independent_swizzle_layout(by_channels<D>());
  const auto rows = as_position_independent_swizzle_layout(by_rows<D>());
  const auto differs = [](uint32_t bytes, auto elements) {
    return bytes != 2u * unsigned(elements);
  };
  int wrong = 0;
  for (int k = 0; k < D / 16; ++k)
    for (int row = 0; row < 64; ++row)
      for (int c = 0; c < 16; ++c)
        wrong += differs(vsa::operand_address(vsa::channels_descriptor(0, k), false, row, c),
                         channels(row, 16 * k + c));
  for (int k = 0; k < 4; ++k)
    for (int channel = 0; channel < D; ++channel)
      for (int r = 0; r < 16; ++r)
        wrong += differs(vsa::operand_address(vsa::rows_descriptor(0, k), true, channel, r),
                         rows(channel, 16 * k + r));
  return wrong;
}

// All bits but the start address, which CuTe can only take from a device pointer; the leading
// offset only where the hardware uses it.
template <int D>
int descriptors() {
  alignas(1024) static bfloat16_t memory[64 * D];
  constexpr uint64_t kStart = 0x3fff, kLeading = kStart << 16;
  const auto ours = [](uint64_t bits, uint64_t unused) { return bits & ~(kStart | unused); };
  const auto channels = local_tile(make_tensor(make_smem_ptr(memory), by_channels<D>()),
                                   Shape<_64, _16>{}, make_coord(0, 0));
  const auto rows = local_tile(make_tensor(make_smem_ptr(memory), by_rows<D>()),
                               Shape<Int<D>, _16>{}, make_coord(0, 0));
  const uint64_t k_major = SM90::GMMA::make_gmma_desc<SM90::GMMA::Major::K>(channels).desc_;
  const uint64_t mn_major = SM90::GMMA::make_gmma_desc<SM90::GMMA::Major::MN>(rows).desc_;
  const uint64_t unused = D == 64 ? kLeading : 0;
  return (ours(k_major, kLeading) != ours(vsa::channels_descriptor(0, 0), kLeading)) +
         (ours(mn_major, unused) != ours(vsa::rows_descriptor(0, 0), unused));
}

// A tile of bytes with rows of 64 or 128, as CuTe lays it out, (row, byte).
template <int Rows, int RowBytes>
auto bytes_by_row() {
  using Atom = std::conditional_t<RowBytes == 128, SM90::GMMA::Layout_K_SW128_Atom<int8_t>,
                                  SM90::GMMA::Layout_K_SW64_Atom<int8_t>>;
  return tile_to_shape(Atom{}, Shape<Int<Rows>, Int<RowBytes>>{});
}

template <int Rows, int RowBytes>
int byte_addresses() {
  const auto layout = as_position_independent_swizzle_layout(bytes_by_row<Rows, RowBytes>());
  int wrong = 0;
  for (int row = 0; row < Rows; ++row)
    for (int byte = 0; byte < RowBytes; ++byte) {
      const uint32_t at = layout(row, byte);
      const uint64_t descriptor = vsa::bytes_descriptor<RowBytes>(0, byte / 32);
      wrong += at != vsa::byte_operand_address(descriptor, row, byte % 32);
      wrong += at != vsa::swizzle_rows<RowBytes>(row * RowBytes + byte);
    }
  return wrong;
}

// All bits but the start address and the leading offset, as above.
template <int Rows, int RowBytes>
int byte_descriptors() {
  alignas(1024) static int8_t memory[Rows * RowBytes];
  constexpr uint64_t kUnused = 0x3fff | 0x3fffull << 16;
  const auto step = local_tile(make_tensor(make_smem_ptr(memory), bytes_by_row<Rows, RowBytes>()),
                               Shape<Int<Rows>, _32>{}, make_coord(0, 0));
  const uint64_t theirs = SM90::GMMA::make_gmma_desc<SM90::GMMA::Major::K>(step).desc_;
  const uint64_t ours = vsa::bytes_descriptor<RowBytes>(0, 0);
  return (theirs & ~kUnused) != (ours & ~kUnused);
}

}  // namespace

int main() {
  const std::pair<const char*, int> counts[] = {
      {"accumulators 64", accumulators<64>()},
      {"accumulators 72", accumulators<72>()},
      {"accumulators 128", accumulators<128>()},
      {"accumulators 136", accumulators<136>()},
      {"A operands", a_operands()},
      {"A operands of bytes", byte_operands()},
      {"swizzles", swizzles()},
      {"addresses 64", addresses<64>()},
      {"addresses 128", addresses<128>()},
      {"descriptors 64", descriptors<64>()},
      {"descriptors 128", descriptors<128>()},
      {"addresses of keys 64", byte_addresses<64, 64>()},
      {"addresses of keys 128", byte_addresses<64, 128>()},
      {"addresses of values 64", byte_addresses<72, 64>()},
      {"addresses of values 128", byte_addresses<136, 64>()},
      {"descriptors of keys 64", byte_descriptors<64, 64>()},
      {"descriptors of keys 128", byte_descriptors<64, 128>()},
      {"descriptors of values 64", byte_descriptors<72, 64>()},
      {"descriptors of values 128", byte_descriptors<136, 64>()}};
  for (const auto& [name, count] : counts) std::printf("%s: %d\n", name, count);
}
