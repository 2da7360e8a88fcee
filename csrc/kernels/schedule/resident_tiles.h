// SPDX-License-Identifier: Apache-2.0
// The resident tiles: one for each consumer of a work tile, on chip for as long as it is worked on
// or until it has been read, with its assignment. They are loaded while the work tile before ends,
// each as soon as its consumer has released the last one.
//
//   barrier   arrives                                               waits
//   full      the producer of resident tiles, and its bytes         their consumer
//   empty     all threads of a consumer, once they need the tile    that producer
//             no longer
#pragma once
#include "kernels/schedule/tile_schedule.h"

namespace vsa {

template <int Consumers>
struct ResidentTiles {
  Shared<Assignment> assignment[Consumers];
  Mbarrier full[Consumers];
  Mbarrier empty[Consumers];

  VSA_DEVICE void init() {
    for (int w = 0; w < Consumers; ++w) {
      full[w].init(1, "resident_full", w);
      empty[w].init(kWarpgroupThreads, "resident_empty", w);
      label(assignment[w], "assignment", w);
    }
  }

  // The producer, one thread. Calls load(w, work, place, barrier) for each tile of a work tile;
  // what that loads must count on the barrier.
  template <class TileSchedule, class Sequence, class Load>
  VSA_DEVICE void load_work_tiles(TileSchedule& schedule, const Sequence& sequence, Load load) {
    int round = 0;
    schedule.for_each_work_tile([&](const WorkTile& work) {
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
    for (int w = 0; w < Consumers; ++w)
      assign(w, {0, 0, Assignment::kFinished}, round).arrive_one();
  }

  // Consumer w, a whole warpgroup. Calls work_on(work) for each work tile, while its tiles are
  // there.
  template <class WorkOn>
  VSA_DEVICE void for_each_work_tile(int w, WorkOn work_on) {
    for_each_work_tile(w, work_on, [](const Assignment&) {});
  }
  // The same for tiles that are needed at the beginning alone: read(work) while they are there,
  // then work_on(work), while the next ones may come.
  template <class Read, class WorkOn>
  VSA_DEVICE void for_each_work_tile(int w, Read read, WorkOn work_on) {
    for (int round = 0;; ++round) {
      full[w].wait(round);
      const Assignment work = assignment[w].get();
      if (work.tile == Assignment::kFinished) break;
      read(work);
      empty[w].arrive_all();
      work_on(work);
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
