// SPDX-License-Identifier: Apache-2.0
// A ring of stages between one producer and its consumers. A stage holds all that travels together
// (K and V of a tile, with whatever small values belong to it) behind one pair of barriers.
//
//   full[stage]    arrives: the producer, and the bytes it announced;   waits: consumers
//   empty[stage]   arrives: every thread of every consumer;             waits: the producer
//
// Slots are numbered 0, 1, 2, ... for as long as the block lives, across its work items; slot n is
// in stage n % Stages. A consumer that has no use for a slot must still see it full before it lets
// go of it: otherwise its next wait on that stage could take an older phase for its own.
#pragma once
#include "prim/prim.h"

namespace vsa {

template <int Stages>
struct Ring {
  static constexpr int kStages = Stages;

  Mbarrier full[Stages];
  Mbarrier empty[Stages];

  // Unsigned, since division by a constant is cheaper then.
  VSA_DEVICE static int stage(int n) { return static_cast<int>(static_cast<unsigned>(n) % Stages); }
  VSA_DEVICE static int use(int n) { return static_cast<int>(static_cast<unsigned>(n) / Stages); }

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

}  // namespace vsa
