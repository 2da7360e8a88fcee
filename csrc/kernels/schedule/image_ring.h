// SPDX-License-Identifier: Apache-2.0
// A ring of tiles that one copy brings as a whole, keys and values together: one wait and one
// release for both (kernels/schedule/rings.h).
#pragma once
#include "kernels/schedule/rings.h"

namespace vsa {

template <int Stages, int Consumers>
struct ImageRing {
  static constexpr int kFirst = Stages, kSecond = Stages;
  static constexpr bool kTogether = true;

  SkippableRing<Stages, Consumers> images;

  VSA_DEVICE static int stage(int n) { return Ring<Stages>::stage(n); }

  VSA_DEVICE void init() { images.init("image_full", "image_empty"); }
  // The producer: the barrier that the copy of tile load n counts on.
  VSA_DEVICE Mbarrier& acquire(int n, uint32_t waiting, int bytes) {
    // Polling takes issue slots from the consumers' warps of its scheduler.
    images.empty[stage(n)].wait_asleep(Ring<Stages>::use(n) - 1);
    Mbarrier& barrier = images.acquire(n, bytes);
    images.skip(n, waiting);
    return barrier;
  }
  VSA_DEVICE void wait_both(const ConsumerStep& step) { images.wait(step.first()); }
  // wanted: whether the step has a tile at all
  VSA_DEVICE bool has_both(const ConsumerStep& step, bool wanted) {
    const RingUse at = step.first();
    return images.full[at.barrier].is_over(at.phase, wanted);
  }
  VSA_DEVICE void release_second(const ConsumerStep& step) { images.release(step.first()); }
};

}  // namespace vsa
