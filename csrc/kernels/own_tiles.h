// SPDX-License-Identifier: Apache-2.0
// The tiles that consumers own: one for each consumer and item, with word of which it is. They are
// loaded while the item before ends, as soon as their consumer has let go of its own.
//
//   barrier   arrives                                    waits
//   full      the producer of own tiles, and its bytes   their consumer
//   empty     all of a consumer, at the end of an item   that producer
#pragma once
#include "kernels/plan.h"

namespace vsa {

template <int Consumers>
struct OwnTiles {
  Shared<Assignment> assignment[Consumers];
  Mbarrier full[Consumers];
  Mbarrier empty[Consumers];

  VSA_DEVICE void init() {
    for (int w = 0; w < Consumers; ++w) {
      full[w].init(1, "own_full", w);
      empty[w].init(kWarpgroupThreads, "own_empty", w);
      label(assignment[w], "assignment", w);
    }
  }

  // The producer, one thread. Calls load(w, work, place, barrier) for each tile of each item; what
  // that loads must count on the barrier.
  template <class Plan, class Load>
  VSA_DEVICE void load_items(Plan& plan, const TiledSequence& sequence, Load load) {
    int round = 0;
    plan.for_each_item([&](const Work& work) {
      for (int w = 0; w < Consumers; ++w) {
        const int tile = tile_at(sequence, work.first_place + w, work.axis);
        Mbarrier& barrier = assign(w, {work.batch, work.head, tile}, round);
        if (tile < 0)
          barrier.arrive_one();
        else
          load(w, work, sequence.place(tile), barrier);
      }
      ++round;
    });
    for (int w = 0; w < Consumers; ++w) assign(w, {0, 0, Assignment::kStop}, round).arrive_one();
  }

  // Consumer w, a whole warpgroup. Calls work_on(item) for each item, while its tiles are there.
  template <class WorkOn>
  VSA_DEVICE void for_each_item(int w, WorkOn work_on) {
    for (int round = 0;; ++round) {
      full[w].wait(round);
      const Assignment item = assignment[w].get();
      if (item.tile == Assignment::kStop) break;
      work_on(item);
      empty[w].arrive_all();
    }
  }

 private:
  // The barrier that what comes with the assignment must arrive at.
  VSA_DEVICE Mbarrier& assign(int w, Assignment next, int round) {
    empty[w].wait(round - 1);
    assignment[w].set(next);
    return full[w];
  }
};

}  // namespace vsa
