// SPDX-License-Identifier: Apache-2.0
// Fine stage, forward: out = softmax(scale Q K^T) V over the selected tiles, and its log-sum-exp.
//
// A block is a planner, a producer and several consumers, which own neighbouring query tiles of one
// head. The planner works out the union of their selections, and the producer loads K and V of each
// tile once into a slot that belongs to those who selected it.
//
// Within a consumer the scores of the next tile are issued before the output of this one, and
// softmax runs while the tensor cores work on the latter:
//
//     scores(next)  out += weights V(held)     in flight together
//     wait for scores -> softmax -> look for the slot after next
//     wait for out -> release held -> rescale out, round weights
//
//   barrier   arrives                                 waits
//   q_full    producer, and the bytes of Q            its consumer
//   q_empty   all of its consumer, once out has left  producer
//   slots     see kernels/slots.h
//   plan      see kernels/plan.h
#pragma once
#include "kernels/epilogue.h"
#include "kernels/plan.h"
#include "kernels/slots.h"
#include "kernels/softmax.h"

namespace vsa {

template <class Element_, int D_>
struct FineForwardConfig {
  using Element = Element_;
  static constexpr int D = D_;
  // Measured on an H200: at D = 128 three consumers with Q in shared memory beat two with Q in
  // registers (bench/NOTES.md); three with Q in registers would not fit.
  static constexpr int kConsumers = 3;
  static constexpr int kStages = D == 128 ? 5 : 12;
  static constexpr int kPlanWords = 8, kPlanSteps = 256;
  static constexpr bool kQueriesInRegisters = D == 64;
  static constexpr int kProducerRegisters = 32;
  static constexpr int kConsumerRegisters = 160;
};

// Epilogue: what becomes of the output before it is stored (kernels/epilogue.h).
template <class Config, class Epilogue = PlainOutput>
struct FineForward {
  using Element = typename Config::Element;
  using Params = typename Epilogue::Params;
  static constexpr int D = Config::D;
  static constexpr int kConsumers = Config::kConsumers;
  static constexpr int kStages = Config::kStages;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads;
  static constexpr int kProducerRegisters = Config::kProducerRegisters;
  static constexpr int kConsumerRegisters = Config::kConsumerRegisters;
  using KeySlots = Slots<kStages, kConsumers>;
  using Slot = typename KeySlots::Slot;
  using KeyPlan = Plan<Config::kPlanSteps>;

  struct SharedMemory {
    Tile<D> q[kConsumers];  // also where the output leaves from
    Tile<D> k[kStages];
    Tile<D> v[kStages];
    KeySlots slots;
    KeyPlan plan;
    Shared<Assignment> assignment[kConsumers];  // travels with Q
    Mbarrier q_full[kConsumers];
    Mbarrier q_empty[kConsumers];
  };

  VSA_DEVICE static void init_barriers(SharedMemory& s) {
    s.slots.init();
    s.plan.init();
    for (int w = 0; w < kConsumers; ++w) {
      s.q_full[w].init(1, "q_full", w);
      s.q_empty[w].init(kWarpgroupThreads, "q_empty", w);
      label(s.q[w], "q", w);
      label(s.assignment[w], "assignment", w);
    }
    for (int i = 0; i < kStages; ++i) {
      label(s.k[i], "k", i);
      label(s.v[i], "v", i);
    }
  }

  VSA_DEVICE static void prologue(const Params& p, SharedMemory& s, int thread, int threads) {
    for (int w = 0; w < kConsumers; ++w)
      zero_tail(s.q[w], p.queries.grid.tile.volume(), thread, threads);
    for (int i = 0; i < kStages; ++i) {
      zero_tail(s.k[i], p.keys.grid.tile.volume(), thread, threads);
      zero_tail(s.v[i], p.keys.grid.tile.volume(), thread, threads);
    }
    fence_async_proxy();
  }

  VSA_DEVICE static void plan(const Params& p, SharedMemory& s) {
    Planner<kConsumers, Config::kPlanWords, Config::kPlanSteps> planner(s.plan, p.queries, p.keys,
                                                                        p.k, p.v);
    planner.add_query_tiles(p);
    planner.stop();
  }

  class Producer {
   public:
    VSA_DEVICE Producer(const Params& p, SharedMemory& s) : p_(p), s_(s) {}

    VSA_DEVICE void run() {
      prefetch_map(p_.q.video.map);
      prefetch_map(p_.k.video.map);
      prefetch_map(p_.v.video.map);
      int round = 0;
      for (int n = 0;; ++n) {
        const auto chunk = s_.plan.take(n);
        if (chunk.stop()) break;
        if (chunk.first()) {
          for (int w = 0; w < kConsumers; ++w) load_queries(chunk.work, w, round);
          ++round;
        }
        if (chunk.steps == 0) s_.slots.post_nothing(slot_++);
        for (int i = 0; i < chunk.steps; ++i) load_keys(n, i);
        s_.plan.give_back(n);
      }
      for (int w = 0; w < kConsumers; ++w) assign(w, {0, 0, Assignment::kStop}, round).arrive_one();
    }

   private:
    // The barrier that what comes with it must arrive at.
    VSA_DEVICE Mbarrier& assign(int w, Assignment assignment, int round) {
      s_.q_empty[w].wait(round - 1);
      s_.assignment[w].set(assignment);
      return s_.q_full[w];
    }

    VSA_DEVICE void load_queries(const Work& work, int w, int round) {
      const int tile = tile_at(p_.queries, work.first_place + w, work.axis);
      Mbarrier& full = assign(w, {work.batch, work.head, tile}, round);
      if (tile < 0) return full.arrive_one();
      const TilePlace at = p_.queries.place(tile);
      const TileBox box = box_of(p_.q, at, work.head, work.batch);
      full.arrive_expect_tx(p_.queries.box_rows(at) * D * 2);
      load_tile(s_.q[w], box.map, box.at, full, CacheHint::EvictFirst);
    }

    VSA_DEVICE void load_keys(int n, int i) {
      const int stage = s_.slots.ring.stage(slot_);
      const PlanStep step = s_.plan.step(n, i);
      const TilePlace at = step.place(p_.keys);
      const uint64_t rows = s_.plan.rows(n, p_.keys, at);
      const int bytes = 2 * p_.keys.box_rows(at) * D * 2;
      Mbarrier& full = s_.slots.post(slot_++, step.flags(), rows, bytes);
      s_.plan.load(n, at, s_.k[stage], p_.k, s_.v[stage], p_.v, full);
    }

    const Params& p_;
    SharedMemory& s_;
    int slot_ = 0;
  };

  class Consumer {
   public:
    VSA_DEVICE Consumer(const Params& p, SharedMemory& s, int w)
        : p_(p), s_(s), w_(w), slots_(s.slots, w) {}

    VSA_DEVICE void run() {
      for (int round = 0;; ++round) {
        s_.q_full[w_].wait(round);
        const Assignment item = s_.assignment[w_].get();
        if (item.tile == Assignment::kStop) break;
        if constexpr (Config::kQueriesInRegisters)
          if (item.tile >= 0) read_tile(q_, s_.q[w_]);
        attend();
        if (item.tile >= 0) store(item);
        s_.q_empty[w_].arrive_all();
      }
      if (elect_one()) bulk_wait<0>();
    }

   private:
    VSA_DEVICE void attend() {
      fill(out_, 0.f);
      softmax_.reset();
      slots_.begin_item();
      Slot held = slots_.take_first();
      while (held.number >= 0) {
        start(held);
        Slot next = slots_.take_after(held);
        while (next.number >= 0) {
          issue_scores(next);
          issue_output(held);
          wgmma_wait<1>(scores_);
          weigh(next);
          // Real branches between the waits: without one, ptxas hoists the second above softmax.
          const Slot after = slots_.take_after(held);
          wgmma_wait<0>(out_);
          slots_.release(held);
          softmax_.rescale(out_);
          round_to<Element>(weights_, scores_);
          held = next;
          next = after;
        }
        issue_output(held);
        wgmma_wait<0>(out_);
        slots_.release(held);
        held = next.number == KeySlots::View::kFar ? slots_.take_first() : next;
      }
    }

    // The first tile of a run: nothing else is in flight.
    VSA_DEVICE void start(const Slot& slot) {
      issue_scores(slot);
      wgmma_wait<0>(scores_);
      weigh(slot);
      softmax_.rescale(out_);
      round_to<Element>(weights_, scores_);
    }
    VSA_DEVICE void issue_scores(const Slot& slot) {
      if constexpr (Config::kQueriesInRegisters)
        mma_ABt<Element>(scores_, q_, s_.k[slot.stage]);
      else
        mma_ABt<Element>(scores_, s_.q[w_], s_.k[slot.stage]);
      wgmma_commit();
    }
    VSA_DEVICE void issue_output(const Slot& slot) {
      mma_AB<Element>(out_, weights_, s_.v[slot.stage]);
      wgmma_commit();
    }
    VSA_DEVICE void weigh(const Slot& slot) {
      mask_columns(scores_, slot.rows);
      softmax_.weigh(scores_, p_.scale);
    }

    VSA_DEVICE void store(const Assignment& item) {
      RowValues lse;
      softmax_.finish(out_, lse, p_.scale);
      const TilePlace at = p_.queries.place(item.tile);
      const uint64_t rows = p_.queries.rows(at, item.batch);
      if (at.region != Region::Video)
        for_each(out_, [=](float& x, int row, int) { x = rows >> row & 1 ? x : 0.f; });
      Epilogue::template finish<Element>(out_, p_, item, at, rows);
      Operand<D> rounded;
      round_to<Element>(rounded, out_);
      write_tile(s_.q[w_], rounded);
      fence_async_proxy();
      named_sync(1 + w_, kWarpgroupThreads);
      if (elect_one()) {
        const TileBox box = box_of(p_.out, at, item.head, item.batch);
        store_tile(box.map, box.at, s_.q[w_]);
        bulk_commit();
        bulk_wait_read<0>();
      }
      const int64_t head = int64_t{item.batch} * p_.heads + item.head;
      float* to = p_.lse + head * p_.queries.grid.num_tokens();
      for_each_row(lse, [&](float x, int row) {
        const int token = p_.queries.token(at, row);
        if (token >= 0) to[token] = rows >> row & 1 ? x : -INFINITY;
      });
    }

    const Params& p_;
    SharedMemory& s_;
    const int w_;
    typename KeySlots::View slots_;
    Softmax softmax_;
    Operand<D> q_;
    Fragment<64> scores_;
    Operand<64> weights_;
    Fragment<D> out_;
  };

  VSA_DEVICE static void produce(const Params& p, SharedMemory& s) {
    if (elect_one()) Producer(p, s).run();
  }
  VSA_DEVICE static void consume(const Params& p, SharedMemory& s, int w) {
    Consumer(p, s, w).run();
  }
};

}  // namespace vsa
