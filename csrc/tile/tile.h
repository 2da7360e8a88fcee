// SPDX-License-Identifier: Apache-2.0
// Tiles in shared memory: how they come, go, and are multiplied.
#pragma once
#include "tile/fragment.h"

namespace vsa {

// 64 rows of D 16-bit channels, in panels of 64 channels as operand.h shows them.
template <int D>
struct alignas(kSwizzleBytes) Tile {
  static_assert(D % kPanelChannels == 0, "a panel is 64 channels wide");
  static constexpr int kPanels = D / kPanelChannels;

  unsigned char bytes[kPanels * kPanelBytes];

  VSA_DEVICE unsigned char* panel(int p) { return bytes + p * kPanelBytes; }
  VSA_DEVICE const unsigned char* panel(int p) const { return bytes + p * kPanelBytes; }
  VSA_DEVICE uint32_t address() const { return smem_address(bytes); }
};

// One small value in shared memory, for all to read once a barrier says so.
template <class T>
struct Shared {
  T value;

  VSA_DEVICE void set(T next) {
    note_write(this, sizeof *this);
    value = next;
  }
  VSA_DEVICE T get() const {
    note_read(this, sizeof *this);
    return value;  // a wait lies before, and with it the compiler's memory
  }
};

// The named barrier at which the threads of consumer w meet; barrier 0 is __syncthreads.
VSA_DEVICE int consumer_barrier(int w) { return 1 + w; }

// ---- copies, by one thread ----------------------------------------------------------------------

// The box of every panel counts in full on the barrier: kPanels times its rows times 128 bytes.
template <int D>
VSA_DEVICE void load_tile(Tile<D>& tile,
                          const TensorMap& map,
                          BoxCoordinates at,
                          Mbarrier& barrier,
                          CacheHint hint = CacheHint::Normal) {
  VSA_UNROLL
  for (int p = 0; p < Tile<D>::kPanels; ++p) {
    tma_load_panel(tile.panel(p), map, at, barrier, hint);
    at.channel += kPanelChannels;
  }
}

template <int D>
VSA_DEVICE void store_tile(const TensorMap& map, BoxCoordinates at, const Tile<D>& tile) {
  VSA_UNROLL
  for (int p = 0; p < Tile<D>::kPanels; ++p) {
    tma_store_panel(map, at, tile.panel(p));
    at.channel += kPanelChannels;
  }
}

// ---- ordinary loads and stores, by the whole warpgroup ------------------------------------------

template <int D>
VSA_DEVICE uint32_t pair_address(const Tile<D>& tile, int row, int channel) {
  return swizzle128(tile.address() + channel / kPanelChannels * kPanelBytes + row * kRowBytes +
                    channel % kPanelChannels * kElementBytes);
}

template <int D>
VSA_DEVICE void write_tile(Tile<D>& tile, const Operand<D>& a) {
  note_write(&tile, sizeof tile, Layout::Swizzled);
  VSA_EACH_LANE(t) {
    const auto& pairs = lane(a, t);
    VSA_UNROLL
    for (int r = 0; r < D / 4; ++r)
      *smem_words(pair_address(tile, pair_row(t, r), pair_column(t, r))) = pairs[r];
  }
}
// The same by a quarter of the instructions.
VSA_DEVICE void write_panel(Tile<64>& tile, const Operand<64>& a) {
  note_write(&tile, sizeof tile, Layout::Swizzled);
  store_panel(tile.address(), a);
}
// The first K channels.
template <int K, int D>
VSA_DEVICE void read_tile(Operand<K>& a, const Tile<D>& tile) {
  static_assert(K <= D, "a tile has no more channels");
  note_read(&tile, sizeof tile, Layout::Swizzled);
  VSA_EACH_LANE(t) {
    auto& pairs = lane(a, t);
    VSA_UNROLL
    for (int r = 0; r < K / 4; ++r)
      pairs[r] = *smem_words(pair_address(tile, pair_row(t, r), pair_column(t, r)));
  }
}

// Accumulator order: thread by thread in fours, contiguous and free of bank conflicts, so that one
// bulk copy moves it. to: [N / 8, 128, 4], aligned to 16 bytes
template <int N>
VSA_DEVICE void write_raw(float* to, const Fragment<N>& f) {
  note_write(to, N * kTileRows * sizeof(float));
  VSA_EACH_LANE(t) {
    const auto& x = lane(f, t);
    VSA_UNROLL
    for (int i = 0; i < N / 2; i += 4)
      reinterpret_cast<FloatFour*>(to)[i / 4 * kWarpgroupThreads + t] = {
          {x[i], x[i + 1], x[i + 2], x[i + 3]}};
  }
}

// Boxes of fewer than 64 tokens never bring the last rows of a tile: they are zeroed once, by any
// number of threads, before the first load. A proxy fence must follow.
template <int D>
VSA_DEVICE void zero_tail(Tile<D>& tile, int rows, int thread, int threads) {
  if (rows == kTileRows) return;
  const int words = (kTileRows - rows) * kRowBytes / 4;
  for (int p = 0; p < Tile<D>::kPanels; ++p) {
    uint32_t* tail = smem_words(tile.address() + p * kPanelBytes + rows * kRowBytes);
    note_write(tail, words * 4, Layout::Any);
    for (int i = thread; i < words; i += threads) tail[i] = 0;
  }
}

// ---- products, by the whole warpgroup; wgmma_commit closes the group ----------------------------

// d = (d +) a b^T, summed over the channels
template <class Element, int D>
VSA_DEVICE void mma_ABt(Fragment<64>& d,
                        const Tile<D>& a,
                        const Tile<D>& b,
                        bool accumulate = false) {
  wgmma_fence();
  VSA_UNROLL
  for (int k = 0; k < D / kReduction; ++k)
    wgmma<Element, false, false>(d, channels_descriptor(a.address(), k),
                                 channels_descriptor(b.address(), k), accumulate || k > 0);
}

template <class Element, int D>
VSA_DEVICE void mma_ABt(Fragment<64>& d,
                        const Operand<D>& a,
                        const Tile<D>& b,
                        bool accumulate = false) {
  wgmma_fence();
  VSA_UNROLL
  for (int k = 0; k < D / kReduction; ++k)
    wgmma<Element, false>(d, a, k, channels_descriptor(b.address(), k), accumulate || k > 0);
}

// The same, with the first K channels of a from registers.
template <class Element, int K, int D>
VSA_DEVICE void mma_ABt(Fragment<64>& d,
                        const Operand<K>& first,
                        const Tile<D>& a,
                        const Tile<D>& b) {
  static_assert(K < D && K % kReduction == 0, "whole products, and not all");
  wgmma_fence();
  VSA_UNROLL
  for (int k = 0; k < K / kReduction; ++k)
    wgmma<Element, false>(d, first, k, channels_descriptor(b.address(), k), k > 0);
  VSA_UNROLL
  for (int k = K / kReduction; k < D / kReduction; ++k)
    wgmma<Element, false, false>(d, channels_descriptor(a.address(), k),
                                 channels_descriptor(b.address(), k), true);
}

// d = (d +) a b, summed over the rows of b
template <class Element, int D>
VSA_DEVICE void mma_AB(Fragment<D>& d,
                       const Operand<64>& a,
                       const Tile<D>& b,
                       bool accumulate = true) {
  wgmma_fence();
  VSA_UNROLL
  for (int k = 0; k < kTileRows / kReduction; ++k)
    wgmma<Element, true>(d, a, k, rows_descriptor(b.address(), k), accumulate || k > 0);
}

template <class Element, int D>
VSA_DEVICE void mma_AB(Fragment<D>& d,
                       const Tile<64>& a,
                       const Tile<D>& b,
                       bool accumulate = true) {
  wgmma_fence();
  VSA_UNROLL
  for (int k = 0; k < kTileRows / kReduction; ++k)
    wgmma<Element, false, true>(d, channels_descriptor(a.address(), k),
                                rows_descriptor(b.address(), k), accumulate || k > 0);
}

// d = (d +) a^T b, summed over the rows of both, for N channels of b from panel `panel` on
template <class Element, int N, int D>
VSA_DEVICE void mma_AtB(Fragment<N>& d,
                        const Tile<64>& a,
                        const Tile<D>& b,
                        int panel = 0,
                        bool accumulate = true) {
  static_assert(N <= D, "the product is no wider than b");
  wgmma_fence();
  VSA_UNROLL
  for (int k = 0; k < kTileRows / kReduction; ++k)
    wgmma<Element, true, true>(d, rows_descriptor(a.address(), k),
                               rows_descriptor(b.address() + panel * kPanelBytes, k),
                               accumulate || k > 0);
}

}  // namespace vsa
