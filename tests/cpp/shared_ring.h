// SPDX-License-Identifier: Apache-2.0
// A ring of stages between one producer and consumers that all look at every slot.
//
//   full[stage]    arrives: the producer, and the bytes it announced;   waits: consumers
//   empty[stage]   arrives: every thread of every consumer;             waits: the producer
//
// A consumer that has no use for a slot must still see it full before it lets go of it: otherwise
// its next wait on that stage could take an older phase for its own.
#pragma once
#include "tile/ring.h"

namespace vsa::test {

template <int Stages>
struct SharedRing : Ring<Stages> {
  using Ring<Stages>::stage, Ring<Stages>::use;

  Mbarrier full[Stages];
  Mbarrier empty[Stages];

  VSA_DEVICE void init(int consumers, const char* full_name, const char* empty_name) {
    for (int i = 0; i < Stages; ++i) {
      full[i].init(1, full_name, i);
      empty[i].init(consumers * kWarpgroupThreads, empty_name, i);
    }
  }

  // Producer, one thread: waits until slot n is free; the barrier that `bytes` of copies into it
  // must count on.
  VSA_DEVICE Mbarrier& acquire(int n, int bytes) {
    wait_empty(n);
    return expect(n, bytes);
  }
  // The same in two steps: small values that travel with a slot are stored in between.
  VSA_DEVICE void wait_empty(int n) { empty[stage(n)].wait(use(n) - 1); }
  VSA_DEVICE Mbarrier& expect(int n, int bytes) {
    full[stage(n)].arrive_expect_tx(bytes);
    return full[stage(n)];
  }

  // Consumers, whole warpgroups.
  VSA_DEVICE void wait(int n) { full[stage(n)].wait(use(n)); }
  VSA_DEVICE void release(int n) { empty[stage(n)].arrive_all(); }
  VSA_DEVICE void skip(int n) {
    wait(n);
    release(n);
  }
};

}  // namespace vsa::test
