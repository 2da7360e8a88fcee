// SPDX-License-Identifier: Apache-2.0
// dQ of a backward in one pass over key tiles. Gradients of scores meet in shared memory; a
// warpgroup that does nothing else, the reducer, multiplies those of a query tile by the key tiles
// that selected it and adds the sum to dQ in global memory, in fp32.
//
//     consumers                                reducer, for each tile load
//     wait for used
//     dS^T -> shared memory, arrive at made    wait for made of each that computes on the tile
//                                              dQ = sum of dS K; arrive at used
//                                              dQ -> staging -> bulk reduction
//
//   barrier   arrive                                       waits
//   made      all threads of a consumer: its n-th dS^T     reducer
//   used      all threads of the reducer                   that consumer: before the one that
//                                                          takes the place of that, and before
//                                                          its gradients replace K
#pragma once
#include "kernels/fine/backward_params.h"
#include "kernels/schedule/tile_schedule.h"

namespace vsa {

// dQ in the order of accumulators: [8, 128 threads, 4].
constexpr int kSumsOfTile = kTileRows * 64;

// Where there is no reducer.
struct NoQuerySums {
  static constexpr bool kThere = false;

  VSA_DEVICE void init() {}
};

// Depth: dS^T of a consumer that wait for the reducer
template <int Consumers, int Depth>
struct QuerySums {
  static constexpr bool kThere = true;
  static constexpr int kDepth = Depth;
  static constexpr int kBuffers = 2;  // of what is on its way to global memory
  using Places = Ring<kDepth>;

  Tile<64> grad_scores[Consumers][kDepth];  // [keys, queries]
  alignas(128) float staging[kBuffers][kSumsOfTile];
  Mbarrier made[Consumers][kDepth], used[Consumers][kDepth];

  VSA_DEVICE void init() {
    for (int w = 0; w < Consumers; ++w)
      for (int i = 0; i < kDepth; ++i) {
        made[w][i].init(kWarpgroupThreads, "made", w * kDepth + i);
        used[w][i].init(kWarpgroupThreads, "used", w * kDepth + i);
        label(grad_scores[w][i], "grad_scores", w * kDepth + i);
      }
    for (int i = 0; i < kBuffers; ++i) label(staging[i], "staging", i);
  }

  // ---- consumer w, a whole warpgroup ----

  // Until there is room for its n-th.
  VSA_DEVICE void wait_room(int w, int n) { used[w][Places::stage(n)].wait(Places::use(n) - 1); }
  VSA_DEVICE void put(int w, int n, const Operand<64>& rounded) {
    write_panel(grad_scores[w][Places::stage(n)], rounded);
  }
  VSA_DEVICE void hand_over(int w, int n) {
    fence_async_proxy();
    made[w][Places::stage(n)].arrive_all();
  }
  // Until all of its first n have been multiplied.
  VSA_DEVICE void wait_used(int w, int n) {
    if (n > 0) used[w][Places::stage(n - 1)].wait(Places::use(n - 1));
  }
};

// What only a kernel with a reducer has.
template <class Config, bool There>
struct ReducerOf {};
template <class Config>
struct ReducerOf<Config, true> {
  static constexpr int kReducerRegisters = Config::kReducerRegisters;
};

// The reducer, a whole warpgroup.
template <class Kernel>
class QueryReducer {
 public:
  using Element = typename Kernel::Element;
  using Params = typename Kernel::Params;
  using SharedMemory = typename Kernel::SharedMemory;
  using Sums = typename Kernel::Sums;
  using Places = typename Sums::Places;
  static_assert(Kernel::kConsumers == 2);

  VSA_DEVICE QueryReducer(const Params& p, SharedMemory& s) : p_(p), s_(s) {}

  VSA_DEVICE void run() {
    s_.schedule.template for_each_load<true>([&](int n, int i) {
      const auto chunk = s_.schedule.chunk(n);
      const TileLoad load = s_.schedule.tile_load(n, i);
      multiply(load.owners());
      add_to(p_.sums(chunk.work.batch, chunk.head, load.tile(p_.queries)));
    });
    if (elect_one()) bulk_wait<0>();
  }

 private:
  // owners: bit w: consumer w computes on the tile. No branch between products and their wait.
  VSA_DEVICE void multiply(uint32_t owners) {
    if (owners == 3) {
      wait(0);
      wait(1);
      issue(0, false);
      issue(1, true);
      wgmma_commit();
      wgmma_wait<0>(sum_);
      release(0);
      release(1);
    } else {
      const int w = owners == 1 ? 0 : 1;
      wait(w);
      issue(w, false);
      wgmma_commit();
      wgmma_wait<0>(sum_);
      release(w);
    }
  }
  VSA_DEVICE void wait(int w) { s_.sums.made[w][stage(w)].wait(Places::use(taken(w))); }
  VSA_DEVICE void issue(int w, bool accumulate) {
    mma_AtB<Element>(sum_, s_.sums.grad_scores[w][stage(w)], s_.k[w], 0, accumulate);
  }
  VSA_DEVICE void release(int w) {
    s_.sums.used[w][stage(w)].arrive_all();
    if (w == 0)
      ++first_taken_;
    else
      ++second_taken_;
  }
  VSA_DEVICE int taken(int w) const { return w == 0 ? first_taken_ : second_taken_; }
  VSA_DEVICE int stage(int w) const { return Places::stage(taken(w)); }
  VSA_DEVICE void add_to(float* tile) {
    float* staging = s_.sums.staging[added_++ % Sums::kBuffers];
    // The reduction before the last has read what it adds.
    if (elect_one()) bulk_wait_read<Sums::kBuffers - 1>();
    meet();
    write_raw(staging, sum_);
    fence_async_proxy();
    meet();
    if (elect_one()) {
      bulk_reduce_add(tile, staging, kSumsOfTile * sizeof(float));
      bulk_commit();
    }
  }
  VSA_DEVICE static void meet() { named_sync(consumer_barrier(2), kWarpgroupThreads); }

  const Params& p_;
  SharedMemory& s_;
  int first_taken_ = 0, second_taken_ = 0, added_ = 0;
  Fragment<64> sum_;  // [queries, 64]
};

}  // namespace vsa
