// SPDX-License-Identifier: Apache-2.0
// Fine stage, forward: out = softmax(scale Q K^T) V over the selected tiles, and its log-sum-exp.
//
// A block is a planner, producers and several consumers, which own neighbouring query tiles of one
// head. The planner works out the union of their selections, and producers load K and V of each
// tile once into slots that belong to those who selected it.
//
// Within a consumer the scores of the next tile are issued before the output of the one it holds,
// and softmax runs while the tensor cores work on the latter:
//
//     scores(next)  out += weights V(held)     in flight together
//     read where to stop after next
//     wait for scores -> let go of K(next) -> softmax
//     look whether K of the tile after next is there
//     wait for out -> let go of V(held) -> rescale out, round weights
//
//   barriers   guard                                            see
//   own        Q, until out has left from its place             kernels/own_tiles.h
//   rings      K and V of the selected tiles                    kernels/slots.h
//   plan       which tiles are loaded, and who stops where      kernels/plan.h
#pragma once
#include "kernels/epilogue.h"
#include "kernels/own_tiles.h"
#include "kernels/planner.h"
#include "kernels/slots.h"
#include "kernels/softmax.h"

namespace vsa {

template <class Element_, int D_>
struct FineForwardConfig {
  using Element = Element_;
  static constexpr int D = D_;
  // Measured: three consumers with Q in shared memory beat two with Q in registers, and four beat
  // three where their registers are enough (bench/log/forward-kernel.md).
  static constexpr int kConsumers = D == 128 ? 3 : 4;
  using Rings =  // of K, of V
      std::conditional_t<D == 128, TwoRings<4, 6, kConsumers>, OneRing<11, kConsumers>>;
  static constexpr int kPlanWords = 8, kPlanSteps = D == 128 ? 96 : 64;
  static constexpr int kProducerRegisters = D == 128 ? 56 : 32;
  static constexpr int kConsumerRegisters = D == 128 ? 152 : 112;
};

// Epilogue: what becomes of the output before it is stored (kernels/epilogue.h).
template <class Config, class Epilogue = PlainOutput>
struct FineForward {
  using Element = typename Config::Element;
  using Params = typename Epilogue::Params;
  static constexpr int D = Config::D;
  static constexpr int kConsumers = Config::kConsumers;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads;
  static constexpr int kProducers = 3;  // of queries, of keys, and of values
  static constexpr int kProducerRegisters = Config::kProducerRegisters;
  static constexpr int kConsumerRegisters = Config::kConsumerRegisters;
  using KeyPlan = Plan<kConsumers, Config::kPlanSteps>;
  using Rings = typename Config::Rings;

  struct SharedMemory {
    Tile<D> q[kConsumers];  // also where the output leaves from
    Tile<D> k[Rings::kFirst];
    Tile<D> v[Rings::kSecond];
    Rings rings;
    KeyPlan plan;
    OwnTiles<kConsumers> own;
  };

  VSA_DEVICE static void init_barriers(SharedMemory& s) {
    s.rings.init();
    s.plan.init(kProducers);
    s.own.init();
    for (int w = 0; w < kConsumers; ++w) label(s.q[w], "q", w);
    for (int i = 0; i < Rings::kFirst; ++i) label(s.k[i], "k", i);
    for (int i = 0; i < Rings::kSecond; ++i) label(s.v[i], "v", i);
  }

  VSA_DEVICE static void prologue(const Params& p, SharedMemory& s, int thread, int threads) {
    for (int w = 0; w < kConsumers; ++w)
      zero_tail(s.q[w], p.queries.grid.tile.volume(), thread, threads);
    for (int i = 0; i < Rings::kFirst; ++i)
      zero_tail(s.k[i], p.keys.grid.tile.volume(), thread, threads);
    for (int i = 0; i < Rings::kSecond; ++i)
      zero_tail(s.v[i], p.keys.grid.tile.volume(), thread, threads);
    fence_async_proxy();
  }

  VSA_DEVICE static void plan(const Params& p, SharedMemory& s) {
    Planner<kConsumers, Config::kPlanWords, Config::kPlanSteps, Rings::kFirst, Rings::kSecond>
        planner(s.plan, p.queries, p.keys, p.k, p.v);
    planner.add_query_tiles(p, p.tickets);
    planner.stop();
  }

  class Producer {
   public:
    VSA_DEVICE Producer(const Params& p, SharedMemory& s) : p_(p), s_(s) {}

    VSA_DEVICE void run_queries() {
      prefetch_map(p_.q.video.map);
      s_.own.load_items(s_.plan, p_.queries,
                        [&](int w, const Work& work, const TilePlace& at, Mbarrier& full) {
                          const TileBox q = box_of(p_.q, at, work.head, work.batch);
                          full.arrive_expect_tx(p_.queries.box_rows(at) * D * 2);
                          load_tile(s_.q[w], q.map, q.at, full, CacheHint::EvictFirst);
                        });
    }
    VSA_DEVICE void run_keys() {
      prefetch_map(p_.k.video.map);
      s_.plan.for_each_step([&](int n, int i) { load_keys(n, i); });
    }
    VSA_DEVICE void run_values() {
      prefetch_map(p_.v.video.map);
      s_.plan.for_each_step([&](int n, int i) { load_values(n, i); });
    }

   private:
    VSA_DEVICE void load_keys(int n, int i) {
      const PlanStep step = s_.plan.step(n, i);
      const TilePlace at = step.place(p_.keys);
      Mbarrier& full = s_.rings.acquire_first(slot_, step.flags(), p_.keys.box_rows(at) * D * 2);
      s_.plan.load(n, at, s_.k[Rings::first_stage(slot_++)], p_.k, &KeyPlan::Origins::first, full);
    }
    VSA_DEVICE void load_values(int n, int i) {
      const PlanStep step = s_.plan.step(n, i);
      const TilePlace at = step.place(p_.keys);
      Mbarrier& full = s_.rings.acquire_second(slot_, step.flags(), p_.keys.box_rows(at) * D * 2);
      s_.plan.load(n, at, s_.v[Rings::second_stage(slot_++)], p_.v, &KeyPlan::Origins::second,
                   full);
    }

    const Params& p_;
    SharedMemory& s_;
    int slot_ = 0;
  };

  class Consumer {
   public:
    VSA_DEVICE Consumer(const Params& p, SharedMemory& s, int w)
        : p_(p), s_(s), w_(w), stops_(s.plan, s.rings, w) {}

    VSA_DEVICE void run() {
      s_.own.for_each_item(w_, [&](const Assignment& item) {
        attend();
        if (item.tile >= 0) store(item);
      });
      if (elect_one()) bulk_wait<0>();
    }

   private:
    VSA_DEVICE void attend() {
      fill(out_, 0.f);
      softmax_.reset();
      const auto wait = [&](const Stop& stop) { wait_keys(stop); };
      Stop held = stops_.first();
      while (held.is(Stop::kOwn)) {
        start(held);
        Stop next = stops_.own(stops_.take(), wait);
        while (next.is(Stop::kOwn)) {
          issue_scores(next);
          issue_output(held);
          Stop after = stops_.take();
          wgmma_wait<1>(scores_);
          s_.rings.release_first(next);
          weigh(next);
          // A real branch between the waits: without one, ptxas hoists the second above softmax.
          s_.rings.wait_second(next);
          after = stops_.turned(after);
          const bool there = after.is(Stop::kOwn) && s_.rings.has_first(after);
          wgmma_wait<0>(out_);
          s_.rings.release_second(held);
          softmax_.rescale(out_);
          round_to<Element>(weights_, scores_);
          held = next;
          next = there ? after : stops_.own(after, wait);
        }
        issue_output(held);
        wgmma_wait<0>(out_);
        s_.rings.release_second(held);
        held = stops_.next_run(next);
      }
      stops_.end_item();
    }

    VSA_DEVICE void wait_keys(const Stop& stop) {
      s_.rings.wait_together(stop);
      s_.rings.wait_first(stop);
    }
    // The first tile of a run: nothing else is in flight.
    VSA_DEVICE void start(const Stop& stop) {
      wait_keys(stop);
      issue_scores(stop);
      wgmma_wait<0>(scores_);
      s_.rings.release_first(stop);
      weigh(stop);
      softmax_.rescale(out_);
      round_to<Element>(weights_, scores_);
      s_.rings.wait_second(stop);
    }
    VSA_DEVICE void issue_scores(const Stop& stop) {
      mma_ABt<Element>(scores_, s_.q[w_], s_.k[stop.first().stage]);
      wgmma_commit();
    }
    VSA_DEVICE void issue_output(const Stop& stop) {
      mma_AB<Element>(out_, weights_, s_.v[stop.second().stage]);
      wgmma_commit();
    }
    VSA_DEVICE void weigh(const Stop& stop) {
      mask_columns(scores_, stop.rows);
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
    Stops<KeyPlan, Rings> stops_;
    Softmax softmax_;
    Fragment<64> scores_;
    Operand<64> weights_;
    Fragment<D> out_;
  };

  VSA_DEVICE static void produce(const Params& p, SharedMemory& s, int which) {
    if (!elect_lane()) return;
    if (which == 0)
      Producer(p, s).run_queries();
    else if (which == 1)
      Producer(p, s).run_keys();
    else
      Producer(p, s).run_values();
  }
  VSA_DEVICE static void consume(const Params& p, SharedMemory& s, int w) {
    Consumer(p, s, w).run();
  }
};

}  // namespace vsa
