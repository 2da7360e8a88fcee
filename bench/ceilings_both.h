// SPDX-License-Identifier: Apache-2.0
// What a backward in one pass would ask of L2: tiles of Q and dO come while as many bytes of dQ in
// fp32 are added to global memory, by two threads that do not know of each other.
#pragma once
#include "ceilings_loads.h"
#include "ceilings_rates.h"

namespace vsa::ceilings {

struct BothParams {
  TensorMap map;
  float* sums;
  int tiles, sum_tiles;  // to draw from
  int pairs;             // of tiles: two loads and one addition each
  uint32_t seed;
  Report report;
};

template <int D>
struct Both {
  static constexpr int kTileBytes = kTileRows * D * 2;
  static constexpr int kSumBytes = kTileRows * D * 4;
  static constexpr int kStages = (kSharedBytes - kUnread * kSumBytes - 2048) / kTileBytes;
  static constexpr int kThreads = 2 * kWarpThreads;

  struct Shared {
    unsigned char ring[kStages][kTileBytes];
    float sums[kUnread][kTileRows * D];
    Mbarrier full[kStages];
  };

  const BothParams& params;
  Shared& shared;
  long long deadline;

  VSA_DEVICE void run() {
    for (int i = threadIdx.x; i < kUnread * kTileRows * D; i += kThreads) shared.sums[0][i] = 1;
    fence_async_proxy();
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) shared.full[i].init(1, "full", i);
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    const int warp = __shfl_sync(~0u, threadIdx.x, 0) / kWarpThreads;
    if (!elect_lane()) return;
    if (warp == 0)
      load();
    else
      add();
  }

  VSA_DEVICE void load() {
    const int slots = 2 * params.pairs;
    for (int n = 0; n < slots; ++n) {
      Mbarrier& full = shared.full[n % kStages];
      if (n >= kStages) wait(full, n / kStages - 1, deadline);
      full.arrive_expect_tx(kTileBytes);
      const int tile = drawn(params.seed, blockIdx.x, n, params.tiles);
      BoxCoordinates at = {0, tile % 8 * 4, tile / 8 % 8 * 4, tile / kTilesPerLayer * 4, 0};
      for (int panel = 0; panel < D / kPanelChannels; ++panel, at.channel += kPanelChannels)
        tma_load_panel(shared.ring[n % kStages] + panel * kPanelBytes, params.map, at, full);
    }
    for (int n = max(0, slots - kStages); n < slots; ++n)
      wait(shared.full[n % kStages], n / kStages, deadline);
  }

  VSA_DEVICE void add() {
    for (int n = 0; n < params.pairs; ++n) {
      const uint32_t to = drawn(params.seed + 1, blockIdx.x, n, params.sum_tiles);
      bulk_reduce_add(params.sums + size_t{to} * kTileRows * D, shared.sums[n % kUnread],
                      kSumBytes);
      bulk_commit();
      bulk_wait_read<kUnread - 1>();
    }
    bulk_wait<0>();
  }
};

template <int D>
__global__ void __launch_bounds__(Both<D>::kThreads, 1)
    both(const __grid_constant__ BothParams params) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const long long start = clock64();
  auto& shared = *reinterpret_cast<typename Both<D>::Shared*>(memory);
  Both<D>{params, shared, start + kPatience}.run();
  __syncthreads();
  if (threadIdx.x == 0) params.report.clocks[blockIdx.x] = clock64() - start;
}

}  // namespace vsa::ceilings
