// SPDX-License-Identifier: Apache-2.0
// The loop of a forward's consumers with everything that it waits for always there: scores,
// softmax, output, of tiles that stay in shared memory, with or without loads beside it.
#pragma once
#include "ceilings_loads.h"
#include "kernels/fine/softmax.h"
#include "tile/tile.h"

namespace vsa::ceilings {

// What is in flight behind a consumer's softmax.
enum class Behind {
  Output,  // the product of the weights before
  Nothing  // of its own: other consumers' products are
};

struct LoopParams {
  TensorMap map;
  int tiles, steps;  // to draw loads from; of each consumer
  int clocks;        // between two loads of a tile of one tensor, 0 for none
  float scale;
  uint32_t seed;
  Report report;
};

template <int Pending, int N>
VSA_DEVICE void wait_products(Fragment<N>& finished) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
  VSA_UNROLL
  for (int i = 0; i < N / 2; ++i) asm volatile("" : "+f"(finished.x[i])::"memory");
}

// Tiles: key tiles in a softmax step. QueriesInRegisters: the left operand of scores
template <int D, int Consumers, int Tiles, Behind Order, bool QueriesInRegisters>
struct Loop {
  static constexpr int kThreads = (Consumers + 1) * kWarpgroupThreads;
  static constexpr int kColumns = Tiles * kTileRows, kTileBytes = kTileRows * D * 2;
  static constexpr int kStages = 4 * 128 / D;  // of 64 rows, a multiple of Tiles
  static constexpr int kLoadsInFlight = 3;
  static constexpr int kRegisters = Consumers == 3 ? 160 : 240;

  struct Shared {
    Tile<D> q[Consumers];
    alignas(kSwizzleBytes) unsigned char k[kStages * kTileBytes];  // panels of kColumns rows
    alignas(kSwizzleBytes) unsigned char v[kStages * kTileBytes];  // tiles
    Mbarrier full[kStages];                                        // complete from the first
    Mbarrier empty[kStages];                                       // nobody waits for them
    Mbarrier loaded[kLoadsInFlight];
    Mbarrier done;
  };

  class Consumer {
   public:
    VSA_DEVICE Consumer(const LoopParams& params, Shared& shared, int own)
        : params_(params), shared_(shared), own_(own) {}

    VSA_DEVICE void run() {
      fill(out_, 0.f);
      softmax_.reset();
      if constexpr (QueriesInRegisters) read_tile(q_, shared_.q[own_]);
      issue_scores(0);
      wait_products<0>(scores_);
      weigh();
#pragma unroll 1
      for (int n = 1; n < params_.steps; ++n) {
        wait_full(n);
        if constexpr (Order == Behind::Output) {
          issue_scores(n);
          issue_output(n - 1);
          wait_products<1>(scores_);
          softmax_.weigh(scores_, params_.scale);
          wait_full(n + 1);  // a branch between the waits
          wait_products<0>(out_);
        } else {
          issue_output(n - 1);
          wait_products<0>(out_);
          issue_scores(n);
          wait_products<0>(scores_);
          softmax_.weigh(scores_, params_.scale);
        }
        release(n - 1);
        softmax_.rescale(out_);
        round_to<Bf16>(weights_, scores_);
      }
      RowValues lse;
      softmax_.finish(out_, lse, params_.scale);
      float sum = lse.x[0];
      for_each(out_, [&](float& x, int, int) { sum += x; });
      params_.report.sink[blockIdx.x * blockDim.x + threadIdx.x] = sum;
      if (threadIdx.x % kWarpgroupThreads == 0) shared_.done.arrive_one();
    }

   private:
    VSA_DEVICE void weigh() {
      softmax_.weigh(scores_, params_.scale);
      softmax_.rescale(out_);
      round_to<Bf16>(weights_, scores_);
    }
    VSA_DEVICE void issue_scores(int n) {
      const uint32_t at = smem_address(shared_.k) + n % (kStages / Tiles) * Tiles * kTileBytes;
      const uint64_t keys = descriptor(at, kChunkBytes, kSwizzleBytes);
      wgmma_fence();
      VSA_UNROLL
      for (int i = 0; i < D / kReduction; ++i) {
        const uint64_t b = advance(keys, i / 4 * Tiles * kPanelBytes + i % 4 * kReduction * 2);
        if constexpr (QueriesInRegisters)
          wgmma<Bf16, false>(scores_, q_, i, b, i > 0);
        else
          wgmma<Bf16, false, false>(scores_, channels_descriptor(shared_.q[own_].address(), i), b,
                                    i > 0);
      }
      wgmma_commit();
    }
    VSA_DEVICE void issue_output(int n) {
      const uint32_t at = smem_address(shared_.v) + n % (kStages / Tiles) * Tiles * kTileBytes;
      wgmma_fence();
      VSA_UNROLL
      for (int i = 0; i < kColumns / kReduction; ++i)
        wgmma<Bf16, true>(out_, weights_, i, rows_descriptor(at + i / 4 * kTileBytes, i % 4), true);
      wgmma_commit();
    }
    VSA_DEVICE void wait_full(int n) {
      VSA_UNROLL
      for (int i = 0; i < Tiles; ++i) shared_.full[(n * Tiles + i) % kStages].wait(-1);
    }
    VSA_DEVICE void release(int n) {
      VSA_UNROLL
      for (int i = 0; i < Tiles; ++i) shared_.empty[(n * Tiles + i) % kStages].arrive_all();
    }

    const LoopParams& params_;
    Shared& shared_;
    const int own_;
    Softmax softmax_;
    Operand<D> q_;
    Fragment<kColumns> scores_;
    Operand<kColumns> weights_;
    Fragment<D> out_;
  };

  // Random tiles into the stages, at most so often, until the consumers are done.
  VSA_DEVICE static void load(const LoopParams& params, Shared& shared) {
    if (params.clocks == 0) return;
    long long next = clock64();
    int n = 0;
    for (; !over(shared.done); ++n) {
      if (n >= kLoadsInFlight) shared.loaded[n % kLoadsInFlight].wait(n / kLoadsInFlight - 1);
      while (clock64() < next) continue;
      next += params.clocks;
      const int tile = drawn(params.seed, blockIdx.x, n, params.tiles);
      BoxCoordinates at = {0, tile % 8 * 4, tile / 8 % 8 * 4, tile / kTilesPerLayer * 4, 0};
      unsigned char* to = (n % 2 == 0 ? shared.k : shared.v) + n / 2 % kStages * kTileBytes;
      Mbarrier& barrier = shared.loaded[n % kLoadsInFlight];
      barrier.arrive_expect_tx(kTileBytes);
      for (int panel = 0; panel < D / kPanelChannels; ++panel, at.channel += kPanelChannels)
        tma_load_panel(to + panel * kPanelBytes, params.map, at, barrier);
    }
    for (int i = n > kLoadsInFlight ? n - kLoadsInFlight : 0; i < n; ++i)
      shared.loaded[i % kLoadsInFlight].wait(i / kLoadsInFlight);
  }
  VSA_DEVICE static bool over(Mbarrier& done) {
    uint32_t said;
    asm volatile(
        "{.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], 0;\n"
        "selp.u32 %0, 1, 0, p;}"
        : "=r"(said)
        : "r"(smem_address(&done))
        : "memory");
    return said != 0;
  }
};

template <class Loop>
__global__ void __launch_bounds__(Loop::kThreads, 1)
    loops(const __grid_constant__ LoopParams params) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<typename Loop::Shared*>(memory);
  fill_shared(memory, offsetof(typename Loop::Shared, full));
  if (threadIdx.x == 0) {
    for (int i = 0; i < Loop::kStages; ++i) {
      shared.full[i].init(1, "full", i);
      shared.empty[i].init(Loop::kThreads - kWarpgroupThreads, "empty", i);
    }
    for (int i = 0; i < Loop::kLoadsInFlight; ++i) shared.loaded[i].init(1, "loaded", i);
    shared.done.init(Loop::kThreads / kWarpgroupThreads - 1, "done", 0);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  const int role = __shfl_sync(~0u, threadIdx.x, 0) / kWarpgroupThreads;
  const long long start = clock64();
  if (role == 0) {
    give_registers<24>();
    if (elect_one()) Loop::load(params, shared);
  } else {
    take_registers<Loop::kRegisters>();
    typename Loop::Consumer(params, shared, role - 1).run();
    if (threadIdx.x == kWarpgroupThreads) params.report.clocks[blockIdx.x] = clock64() - start;
  }
}

}  // namespace vsa::ceilings
