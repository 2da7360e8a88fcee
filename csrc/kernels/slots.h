// SPDX-License-Identifier: Apache-2.0
// A ring whose slots belong to some of its consumers, and what a consumer knows of them: the plan
// says where it stops (kernels/plan.h), and it never looks at other slots. The producer arrives for
// those who pass a slot over.
//
// A consumer that did not wait for a stage's last use could take an older phase for its own. So a
// stage has a full barrier for each of kRounds uses in turn, and nobody passes over more slots than
// that covers.
#pragma once
#include "kernels/plan.h"

namespace vsa {

// Producers: those that load a part of every slot each
template <int Stages, int Consumers, int Producers = 1>
struct OwnedRing {
  static constexpr int kRounds = RingUse::kRounds;
  static_assert(kMostPassed < (kRounds - 1) * Stages, "phases would be taken for each other");

  Mbarrier full[Stages * kRounds];
  Mbarrier empty[Stages];

  VSA_DEVICE void init(const char* full_name, const char* empty_name) {
    for (int i = 0; i < Stages * kRounds; ++i) full[i].init(Producers, full_name, i);
    for (int i = 0; i < Stages; ++i) empty[i].init(Consumers * kWarpgroupThreads, empty_name, i);
  }

  // A producer, one thread: waits until slot n is free; the barrier that `bytes` of copies into it
  // must count on.
  VSA_DEVICE Mbarrier& acquire(int n, int bytes) {
    empty[Ring<Stages>::stage(n)].wait(Ring<Stages>::use(n) - 1);
    Mbarrier& barrier = full[RingUse::of<Stages>(n).barrier];
    barrier.arrive_expect_tx(bytes);
    return barrier;
  }
  // After that, one of the producers. stopping: bit w: consumer w waits for slot n and lets go of
  // it
  VSA_DEVICE void pass_over(int n, uint32_t stopping) {
    const int passing = Consumers - popcount(stopping);
    if (passing > 0) empty[Ring<Stages>::stage(n)].arrive_one(passing * kWarpgroupThreads);
  }

  // Consumers, whole warpgroups.
  VSA_DEVICE void wait(RingUse at) { full[at.barrier].wait(at.phase); }
  VSA_DEVICE bool is_full(RingUse at) { return full[at.barrier].is_over(at.phase); }
  VSA_DEVICE void release(RingUse at) { empty[at.stage].arrive_all(); }
};

// Two tensors whose tiles go together, slot n of one with slot n of the other, each with a producer
// of its own. A consumer holds its tile of the second while it takes its next slot, but not that of
// the first: in rings of their own both are held no longer than they are needed.
template <int First, int Second, int Consumers>
struct TwoRings {
  static constexpr int kFirst = First, kSecond = Second;  // stages

  OwnedRing<First, Consumers> first;
  OwnedRing<Second, Consumers> second;

  VSA_DEVICE static int first_stage(int n) { return Ring<First>::stage(n); }
  VSA_DEVICE static int second_stage(int n) { return Ring<Second>::stage(n); }

  VSA_DEVICE void init() {
    first.init("first_full", "first_empty");
    second.init("second_full", "second_empty");
  }
  VSA_DEVICE Mbarrier& acquire_first(int n, uint32_t stopping, int bytes) {
    Mbarrier& barrier = first.acquire(n, bytes);
    first.pass_over(n, stopping);
    return barrier;
  }
  VSA_DEVICE Mbarrier& acquire_second(int n, uint32_t stopping, int bytes) {
    Mbarrier& barrier = second.acquire(n, bytes);
    second.pass_over(n, stopping);
    return barrier;
  }
  VSA_DEVICE void wait_first(const Stop& stop) { first.wait(stop.first()); }
  VSA_DEVICE void wait_second(const Stop& stop) { second.wait(stop.second()); }
  // A look long before the tile is needed. A wait at its turn takes time even where it is over.
  VSA_DEVICE bool has_first(const Stop& stop) { return first.is_full(stop.first()); }
  VSA_DEVICE bool has_second(const Stop& stop) { return second.is_full(stop.second()); }
  VSA_DEVICE bool has_both(const Stop& stop) { return has_first(stop) && has_second(stop); }
  VSA_DEVICE void wait_together(const Stop&) {}  // they come one by one
  VSA_DEVICE void release_first(const Stop& stop) { first.release(stop.first()); }
  VSA_DEVICE void release_second(const Stop& stop) { second.release(stop.second()); }
};

// The same in one ring, where tiles are small: there is room enough, and half as much to wait for.
template <int Stages, int Consumers>
struct OneRing {
  static constexpr int kFirst = Stages, kSecond = Stages;

  OwnedRing<Stages, Consumers, 2> both;

  VSA_DEVICE static int first_stage(int n) { return Ring<Stages>::stage(n); }
  VSA_DEVICE static int second_stage(int n) { return Ring<Stages>::stage(n); }

  VSA_DEVICE void init() { both.init("both_full", "both_empty"); }
  VSA_DEVICE Mbarrier& acquire_first(int n, uint32_t stopping, int bytes) {
    Mbarrier& barrier = both.acquire(n, bytes);
    both.pass_over(n, stopping);
    return barrier;
  }
  VSA_DEVICE Mbarrier& acquire_second(int n, uint32_t, int bytes) { return both.acquire(n, bytes); }
  VSA_DEVICE bool has_first(const Stop& stop) { return has_both(stop); }
  VSA_DEVICE bool has_second(const Stop& stop) { return has_both(stop); }
  VSA_DEVICE bool has_both(const Stop& stop) { return both.is_full(stop.first()); }
  VSA_DEVICE void wait_together(const Stop& stop) { both.wait(stop.first()); }
  VSA_DEVICE void wait_first(const Stop&) {}
  VSA_DEVICE void wait_second(const Stop&) {}
  VSA_DEVICE void release_first(const Stop&) {}
  VSA_DEVICE void release_second(const Stop& stop) { both.release(stop.second()); }
};

// Where one consumer stops, a whole warpgroup.
template <class Plan, class Rings>
class Stops {
 public:
  VSA_DEVICE Stops(Plan& plan, Rings& rings, int w) : plan_(plan), rings_(rings), w_(w) {}

  // The first of an item's own slots, or its end.
  VSA_DEVICE Stop first() {
    open();
    return own(take());
  }
  // The next stop, whatever it is. Waits for nothing.
  VSA_DEVICE Stop take() { return stops_[next_++].get(); }
  // `stop` or one after it, up to the next that is ours, a drain or the end.
  VSA_DEVICE Stop own(Stop stop) {
    stop = turned(stop);
    while (stop.is(Stop::kPass)) {
      rings_.wait_together(stop);
      rings_.wait_first(stop);
      rings_.release_first(stop);
      rings_.wait_second(stop);
      rings_.release_second(stop);
      stop = turned(take());
    }
    return stop;
  }
  // The same, and if it is ours after wait(stop).
  template <class Wait>
  VSA_DEVICE Stop own(Stop stop, Wait wait) {
    stop = own(stop);
    if (stop.is(Stop::kOwn)) wait(stop);
    return stop;
  }
  // `stop`, or the first of the next chunk. A loop, though no chunk begins with a page: ptxas keeps
  // softmax in front of it, which it does not for a branch.
  VSA_DEVICE Stop turned(Stop stop) {
    while (stop.is(Stop::kPage)) {
      give_back();
      open();
      stop = take();
    }
    return stop;
  }
  // Where a run goes on that ended with `stop`, now that nothing is held: at one of ours, or the
  // end.
  VSA_DEVICE Stop next_run(Stop stop) {
    while (stop.is(Stop::kDrain)) stop = own(take());
    return stop;
  }
  VSA_DEVICE void end_item() { give_back(); }

 private:
  VSA_DEVICE void open() {
    const int buffer = chunk_ % Plan::kBuffers;
    plan_.full[buffer].wait(chunk_ / Plan::kBuffers);
    stops_ = plan_.stops[buffer][w_];
    next_ = 0;
  }
  VSA_DEVICE void give_back() { plan_.empty[chunk_++ % Plan::kBuffers].arrive_all(); }

  Plan& plan_;
  Rings& rings_;
  const int w_;
  const Shared<Stop>* stops_;
  int chunk_ = 0, next_ = 0;
};

}  // namespace vsa
