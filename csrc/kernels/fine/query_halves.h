// SPDX-License-Identifier: Apache-2.0
// dQ of the backward at head_dim 128, of those pairs whose key tiles share a query tile. Registers
// have no room for a reducer, so the consumers make it themselves, in the registers of dP. Where a
// query tile was selected by both key tiles of a block, consumers meet: each makes 64 channels of
// dQ from the dS of both, and adds them to dQ in global memory, in fp32. What one key tile has
// alone is left to the pass over query tiles, which begins with these sums: for one pair alone they
// would take as many bytes as for two (bench/log/one-pass.md).
//
//     wait for used
//     dS^T -> shared memory, arrive at made
//     wait for made: dQ = sum of dS K
//     arrive at used
//     dQ -> staging -> bulk reduction
//
//   barrier   arrive                                         waits
//   made      all threads of all consumers: dS^T is stored   all consumers
//             and their staging has been read
//   used      the same: their product is finished            all consumers, before dS^T goes to
//                                                            the same place again, and before
//                                                            gradients replace K
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

  // The warps of a consumer learn from it, too, that their staging has been read.
  VSA_DEVICE void hand_over() {
    fence_async_proxy();
    if (elect_one()) bulk_wait_read<0>();
    made.arrive_all();
  }
  VSA_DEVICE void wait_others(int met) { made.wait(met); }
  VSA_DEVICE void release() { used.arrive_all(); }
  // Adds its 64 channels to sums.
  VSA_DEVICE void add_to(float* sums, int w, const Fragment<64>& half) {
    write_raw(staging[w], half);
    fence_async_proxy();
    named_sync(consumer_barrier(w), kWarpgroupThreads);
    if (elect_one()) {
      bulk_reduce_add(sums, staging[w], sizeof staging[w]);
      bulk_commit();
    }
  }
};

}  // namespace vsa
