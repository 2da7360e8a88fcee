// SPDX-License-Identifier: Apache-2.0
// Rings of stages whose tiles not every consumer reads, and how a consumer walks its steps. A
// consumer looks only at tile loads for which it has a step (kernels/schedule/tile_schedule.h); for
// all others the producer arrives at the empty barrier in its place.
//
// A parity bit cannot tell phase n from n + 2, so a consumer that misses uses of a stage could take
// an old phase for the one it waits for. Each stage therefore has kRounds full barriers, used
// round-robin, and a consumer never misses more uses than they tell apart.
#pragma once
#include "kernels/schedule/tile_schedule.h"

namespace vsa {

// Producers: how many load a part of every tile load
template <int Stages, int Consumers, int Producers = 1>
struct SkippableRing {
  static constexpr int kRounds = RingUse::kRounds;
  static_assert(kMostSkipped < (kRounds - 1) * Stages, "phases would be taken for each other");

  Mbarrier full[Stages * kRounds];
  Mbarrier empty[Stages];

  VSA_DEVICE void init(const char* full_name, const char* empty_name) {
    for (int i = 0; i < Stages * kRounds; ++i) full[i].init(Producers, full_name, i);
    for (int i = 0; i < Stages; ++i) empty[i].init(Consumers * kWarpgroupThreads, empty_name, i);
  }

  // A producer, one thread: waits until the stage of tile load n is free. Returns the barrier that
  // `bytes` of copies must count on.
  VSA_DEVICE Mbarrier& acquire(int n, int bytes) {
    empty[Ring<Stages>::stage(n)].wait(Ring<Stages>::use(n) - 1);
    Mbarrier& barrier = full[RingUse::of<Stages>(n).barrier];
    barrier.arrive_expect_tx(bytes);
    return barrier;
  }
  // After that, one of the producers: arrives for the consumers without a step. waiting: bit w:
  // consumer w has one
  VSA_DEVICE void skip(int n, uint32_t waiting) {
    const int skipping = Consumers - popcount(waiting);
    if (skipping > 0) empty[Ring<Stages>::stage(n)].arrive_one(skipping * kWarpgroupThreads);
  }

  // Consumers, whole warpgroups.
  VSA_DEVICE void wait(RingUse at) { full[at.barrier].wait(at.phase); }
  VSA_DEVICE bool is_full(RingUse at) { return full[at.barrier].is_over(at.phase); }
  VSA_DEVICE void release(RingUse at) { empty[at.stage].arrive_all(); }
};

// Two tensors whose tiles are loaded together, each by its own producer. A consumer holds its tile
// of the second tensor while it takes the next pair, but not its tile of the first: with a ring for
// each tensor no stage is held longer than needed.
template <int First, int Second, int Consumers>
struct TwoRings {
  static constexpr int kFirst = First, kSecond = Second;  // stages
  static constexpr bool kTogether = false;                // each tile has its own wait and release

  SkippableRing<First, Consumers> first;
  SkippableRing<Second, Consumers> second;

  VSA_DEVICE static int first_stage(int n) { return Ring<First>::stage(n); }
  VSA_DEVICE static int second_stage(int n) { return Ring<Second>::stage(n); }

  VSA_DEVICE void init() {
    first.init("first_full", "first_empty");
    second.init("second_full", "second_empty");
  }
  VSA_DEVICE Mbarrier& acquire_first(int n, uint32_t waiting, int bytes) {
    Mbarrier& barrier = first.acquire(n, bytes);
    first.skip(n, waiting);
    return barrier;
  }
  VSA_DEVICE Mbarrier& acquire_second(int n, uint32_t waiting, int bytes) {
    Mbarrier& barrier = second.acquire(n, bytes);
    second.skip(n, waiting);
    return barrier;
  }
  VSA_DEVICE void wait_first(const ConsumerStep& step) { first.wait(step.first()); }
  VSA_DEVICE void wait_second(const ConsumerStep& step) { second.wait(step.second()); }
  // A test long before the tile is needed: a wait costs time even if its phase is over.
  VSA_DEVICE bool has_first(const ConsumerStep& step) { return first.is_full(step.first()); }
  VSA_DEVICE bool has_second(const ConsumerStep& step) { return second.is_full(step.second()); }
  VSA_DEVICE bool has_both(const ConsumerStep& step) { return has_first(step) && has_second(step); }
  VSA_DEVICE void release_first(const ConsumerStep& step) { first.release(step.first()); }
  VSA_DEVICE void release_second(const ConsumerStep& step) { second.release(step.second()); }
};

// The same with one ring for both, where tiles are small: stages suffice, and there are half as
// many waits. A pair comes with one wait and goes with one release, when the second is done with.
template <int Stages, int Consumers>
struct OneRing {
  static constexpr int kFirst = Stages, kSecond = Stages;
  static constexpr bool kTogether = true;

  SkippableRing<Stages, Consumers, 2> both;

  VSA_DEVICE static int first_stage(int n) { return Ring<Stages>::stage(n); }
  VSA_DEVICE static int second_stage(int n) { return Ring<Stages>::stage(n); }

  VSA_DEVICE void init() { both.init("both_full", "both_empty"); }
  VSA_DEVICE Mbarrier& acquire_first(int n, uint32_t waiting, int bytes) {
    Mbarrier& barrier = both.acquire(n, bytes);
    both.skip(n, waiting);
    return barrier;
  }
  VSA_DEVICE Mbarrier& acquire_second(int n, [[maybe_unused]] uint32_t waiting, int bytes) {
    return both.acquire(n, bytes);
  }
  VSA_DEVICE bool has_first(const ConsumerStep& step) { return has_both(step); }
  VSA_DEVICE bool has_second(const ConsumerStep& step) { return has_both(step); }
  VSA_DEVICE bool has_both(const ConsumerStep& step) { return both.is_full(step.first()); }
  VSA_DEVICE void wait_both(const ConsumerStep& step) { both.wait(step.first()); }
  VSA_DEVICE void release_second(const ConsumerStep& step) { both.release(step.second()); }
};

// Bytes of a block that the kernel leaves free. A kernel asserts that another stage would not fit:
// rings are as deep as shared memory allows, and of two the second gets more, since its tiles are
// held for longer.
template <class Kernel>
constexpr int kBytesLeft = kSharedBytes - static_cast<int>(sizeof(typename Kernel::SharedMemory));

// The steps of one consumer, a whole warpgroup.
template <class TileSchedule, class Rings>
class ConsumerSteps {
 public:
  VSA_DEVICE ConsumerSteps(TileSchedule& schedule, Rings& rings, int w)
      : schedule_(schedule), rings_(rings), w_(w) {}

  // The first kCompute or kFlush of a work tile, or its end.
  VSA_DEVICE ConsumerStep first() {
    acquire_chunk();
    return next_compute(take());
  }
  // The next step, of any kind. Waits for nothing.
  VSA_DEVICE ConsumerStep take() { return steps_[next_++].get(); }
  // `step`, or the first one from there on that is kCompute, kFlush or kDone.
  VSA_DEVICE ConsumerStep next_compute(ConsumerStep step) {
    step = past_chunk_end(step);
    while (step.is(ConsumerStep::kSkip)) {
      if constexpr (Rings::kTogether) {
        rings_.wait_both(step);
      } else {
        rings_.wait_first(step);
        rings_.release_first(step);
        rings_.wait_second(step);
      }
      rings_.release_second(step);
      step = past_chunk_end(take());
    }
    return step;
  }
  // The same; a kCompute is returned after wait(step).
  template <class Wait>
  VSA_DEVICE ConsumerStep next_compute(ConsumerStep step, Wait wait) {
    step = next_compute(step);
    if (step.is(ConsumerStep::kCompute)) wait(step);
    return step;
  }
  // `step`, or the first one of the next chunk. A loop, though no chunk is empty: ptxas keeps
  // softmax in front of a loop, and does not in front of a branch.
  VSA_DEVICE ConsumerStep past_chunk_end(ConsumerStep step) {
    while (step.is(ConsumerStep::kNextChunk)) {
      release_chunk();
      acquire_chunk();
      step = take();
    }
    return step;
  }
  // After a run that ended with `step`, now that no tile is held: the kCompute that begins the next
  // run, or kDone.
  VSA_DEVICE ConsumerStep resume(ConsumerStep step) {
    while (step.is(ConsumerStep::kFlush)) step = next_compute(take());
    return step;
  }
  VSA_DEVICE void end_work_tile() { release_chunk(); }

 private:
  VSA_DEVICE void acquire_chunk() {
    const int buffer = chunk_ % TileSchedule::kBuffers;
    schedule_.full[buffer].wait(chunk_ / TileSchedule::kBuffers);
    steps_ = schedule_.steps[buffer][w_];
    next_ = 0;
  }
  VSA_DEVICE void release_chunk() {
    schedule_.empty[chunk_++ % TileSchedule::kBuffers].arrive_all();
  }

  TileSchedule& schedule_;
  Rings& rings_;
  const int w_;
  const Shared<ConsumerStep>* steps_;
  int chunk_ = 0, next_ = 0;
};

}  // namespace vsa
