// SPDX-License-Identifier: Apache-2.0
// dQ of a backward in one pass over key tiles at head_dim 128, where no registers are left for a
// reducer: the consumers make it themselves, 64 channels at a time, in the registers of dP. A query
// tile that both key tiles selected is one where they meet: each makes a half of the channels from
// both dS. Of any other tile one consumer makes both halves, one after the other.
//
//     where they meet                             alone
//     wait for used                               wait for used
//     dS^T -> shared memory, arrive at made       dS^T -> shared memory, its warps meet
//     wait for made: dQ = sum of dS K             dQ = dS K, both halves
//     arrive at used
//     dQ -> staging -> bulk reduction             dQ -> staging -> bulk reduction, twice
//
//   barrier   arrive                                            waits
//   made      all threads of all consumers, where they meet:    all consumers
//             dS^T is stored, and staging has been read
//   used      the same, when their product is finished          all consumers, before dS^T goes to
//                                                               the same place again, and before
//                                                               gradients replace K
#pragma once
#include "kernels/fine/query_sums.h"

namespace vsa {

template <int Consumers>
struct QueryHalves {
  static constexpr bool kThere = true, kReducer = false;

  Tile<64> grad_scores[Consumers];  // [keys, queries]
  alignas(128) float staging[Consumers][kSumsOfPanel];
  Mbarrier made, used;

  VSA_DEVICE void init() {
    made.init(Consumers * kWarpgroupThreads, "made", 0);
    used.init(Consumers * kWarpgroupThreads, "used", 0);
    for (int w = 0; w < Consumers; ++w) {
      label(grad_scores[w], "grad_scores", w);
      label(staging[w], "staging", w);
    }
  }

  // ---- consumer w, a whole warpgroup. met: how often consumers have met before ----

  // Until the others have read what was last in its place.
  VSA_DEVICE void wait_room(int met) { used.wait(met - 1); }
  VSA_DEVICE void put(int w, const Operand<64>& rounded) { write_panel(grad_scores[w], rounded); }

  VSA_DEVICE void hand_over() {
    publish();
    made.arrive_all();
  }
  VSA_DEVICE void wait_others(int met) { made.wait(met); }
  VSA_DEVICE void release() { used.arrive_all(); }
  // To its own warps, where it computes alone.
  VSA_DEVICE void hand_to_own(int w) {
    publish();
    meet(w);
  }
  VSA_DEVICE void wait_staging(int w) {
    if (elect_one()) bulk_wait_read<0>();
    meet(w);
  }
  // Adds what it has made of 64 channels. Staging must have been read.
  VSA_DEVICE void add_to(float* sums, int w, const Fragment<64>& made_here) {
    write_raw(staging[w], made_here);
    fence_async_proxy();
    meet(w);
    if (elect_one()) {
      bulk_reduce_add(sums, staging[w], sizeof staging[w]);
      bulk_commit();
    }
  }

 private:
  // The warps of a consumer learn that staging has been read by the barrier that follows.
  VSA_DEVICE static void publish() {
    fence_async_proxy();
    if (elect_one()) bulk_wait_read<0>();
  }
  VSA_DEVICE static void meet(int w) { named_sync(consumer_barrier(w), kWarpgroupThreads); }
};

}  // namespace vsa
