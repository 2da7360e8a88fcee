// SPDX-License-Identifier: Apache-2.0
// Fine stage, backward, first pass: the gradients of keys and values.
//
//   P^T = 2^(scale K Q^T - LSE)      dV = P^T dO
//   dS^T = P^T (V dO^T - delta)      dK = scale dS^T Q
//
// The forward kernel with the roles changed: consumers own neighbouring key tiles, whose gradients
// stay in registers; the planner walks the transposed selection, and producers load dO with delta
// and Q with its log-sum-exp of each query tile. Queries of all heads that share a key head come
// one head after the other. Scores are computed transposed, so that P^T and dS^T come out as the
// operands of the next products and never leave the registers.
//
//     scores(next)    dK += dS^T Q of the tile held    in flight together
//     read where to stop after next
//     wait for scores -> weights
//     wait for dK -> let go of Q(held)
//     look whether Q of the tile after next is there
//     dP(next)        dV += P^T dO                     in flight together
//     wait for dP -> dS
//     wait for dV -> let go of dO(next)
//
//   barriers   guard                                            see
//   own        K and V, until dK and dV have left from there    kernels/own_tiles.h
//   rings      dO with delta, Q with its log-sum-exp            kernels/slots.h
//   plan       which tiles are loaded, and who stops where      kernels/plan.h
#pragma once
#include "kernels/backward_params.h"
#include "kernels/own_tiles.h"
#include "kernels/planner.h"
#include "kernels/slots.h"

namespace vsa {

template <class Element_, int D_>
struct FineBackwardKeysConfig {
  using Element = Element_;
  static constexpr int D = D_;
  static constexpr int kConsumers = 2;
  using Rings =  // of dO, of Q
      std::conditional_t<D == 128, TwoRings<4, 5, kConsumers>, OneRing<11, kConsumers>>;
  static constexpr int kPlanWords = 8, kPlanSteps = D == 128 ? 96 : 64;
  static constexpr bool kKeysInRegisters = D == 64;  // K and V, where registers allow
  static constexpr int kProducerRegisters = D == 128 ? 24 : 40;
  static constexpr int kConsumerRegisters = D == 128 ? 240 : 232;
};

template <class Config>
struct FineBackwardKeys {
  using Element = typename Config::Element;
  using Params = FineBackwardParams;
  static constexpr int D = Config::D;
  static constexpr int kConsumers = Config::kConsumers;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads;
  static constexpr int kProducers = 3;  // of keys and values, of dO, and of queries
  static constexpr int kProducerRegisters = Config::kProducerRegisters;
  static constexpr int kConsumerRegisters = Config::kConsumerRegisters;
  using QueryPlan = Plan<kConsumers, Config::kPlanSteps>;
  using Rings = typename Config::Rings;

  struct SharedMemory {
    Tile<D> k[kConsumers];  // also where the gradients leave from
    Tile<D> v[kConsumers];
    Tile<D> grad_out[Rings::kFirst];
    Tile<D> q[Rings::kSecond];
    alignas(16) float delta[Rings::kFirst][kTileRows];  // travels with dO
    alignas(16) float lse[Rings::kSecond][kTileRows];   // travels with Q
    Rings rings;
    QueryPlan plan;
    OwnTiles<kConsumers> own;
  };

  VSA_DEVICE static void init_barriers(SharedMemory& s) {
    s.rings.init();
    s.plan.init(kProducers);
    s.own.init();
    for (int w = 0; w < kConsumers; ++w) {
      label(s.k[w], "k", w);
      label(s.v[w], "v", w);
    }
    for (int i = 0; i < Rings::kFirst; ++i) {
      label(s.grad_out[i], "grad_out", i);
      label(s.delta[i], "delta", i);
    }
    for (int i = 0; i < Rings::kSecond; ++i) {
      label(s.q[i], "q", i);
      label(s.lse[i], "lse", i);
    }
  }

  VSA_DEVICE static void prologue(const Params& p, SharedMemory& s, int thread, int threads) {
    for (int w = 0; w < kConsumers; ++w) {
      zero_tail(s.k[w], p.keys.grid.tile.volume(), thread, threads);
      zero_tail(s.v[w], p.keys.grid.tile.volume(), thread, threads);
    }
    for (int i = 0; i < Rings::kFirst; ++i)
      zero_tail(s.grad_out[i], p.queries.grid.tile.volume(), thread, threads);
    for (int i = 0; i < Rings::kSecond; ++i)
      zero_tail(s.q[i], p.queries.grid.tile.volume(), thread, threads);
    fence_async_proxy();
  }

  // The longest columns first within each key head. The query heads that share it come one after
  // the other.
  VSA_DEVICE static void plan(const Params& p, SharedMemory& s) {
    Planner<kConsumers, Config::kPlanWords, Config::kPlanSteps, Rings::kFirst, Rings::kSecond>
        planner(s.plan, p.keys, p.queries, p.grad_out, p.q);
    const WorkList list(p.keys, kConsumers, p.batch, p.kv_heads, p.key_axes);
    const int tiles = p.keys.grid.num_tiles(), words = bitmap::words(p.queries.grid.num_tiles());
    const int sharing = p.heads / p.kv_heads;
    list.take_each(p.key_tickets, kConsumers, [&](Work work) {
      const int* order = p.order + (work.batch * p.kv_heads + work.head) * list.groups;
      work.first_place = load_global(order + work.first_place / kConsumers) * kConsumers;
      const int head = work.head * sharing;
      planner.add(work, bitmap_of(p.transposed, work.batch, p.heads, head, tiles, words), head,
                  sharing);
    });
    planner.stop();
  }

  class Producer {
   public:
    VSA_DEVICE Producer(const Params& p, SharedMemory& s) : p_(p), s_(s) {}

    VSA_DEVICE void run_keys() {
      prefetch_map(p_.k.video.map);
      prefetch_map(p_.v.video.map);
      s_.own.load_items(s_.plan, p_.keys,
                        [&](int w, const Work& work, const TilePlace& at, Mbarrier& full) {
                          const TileBox k = box_of(p_.k, at, work.head, work.batch);
                          const TileBox v = box_of(p_.v, at, work.head, work.batch);
                          full.arrive_expect_tx(2 * p_.keys.box_rows(at) * D * 2);
                          load_tile(s_.k[w], k.map, k.at, full, CacheHint::EvictFirst);
                          load_tile(s_.v[w], v.map, v.at, full, CacheHint::EvictFirst);
                        });
    }
    VSA_DEVICE void run_grad_out() {
      prefetch_map(p_.grad_out.video.map);
      s_.plan.for_each_step([&](int n, int i) { load_grad_out(n, i); });
    }
    VSA_DEVICE void run_queries() {
      prefetch_map(p_.q.video.map);
      s_.plan.for_each_step([&](int n, int i) { load_query(n, i); });
    }

   private:
    // Rows that are no tokens need no mask: their statistics make them weigh nothing.
    VSA_DEVICE const RowStats& stats(int n, int i) const {
      const auto chunk = s_.plan.chunk(n);
      return p_.stats(chunk.work.batch, chunk.head, s_.plan.step(n, i).tile(p_.queries));
    }
    VSA_DEVICE void load_grad_out(int n, int i) {
      const PlanStep step = s_.plan.step(n, i);
      const TilePlace at = step.place(p_.queries);
      Mbarrier& full = s_.rings.acquire_first(slot_, step.flags(), bytes(at));
      const int stage = Rings::first_stage(slot_++);
      s_.plan.load(n, at, s_.grad_out[stage], p_.grad_out, &QueryPlan::Origins::first, full);
      bulk_load(s_.delta[stage], stats(n, i).delta, kStatBytes, full);
    }
    VSA_DEVICE void load_query(int n, int i) {
      const PlanStep step = s_.plan.step(n, i);
      const TilePlace at = step.place(p_.queries);
      Mbarrier& full = s_.rings.acquire_second(slot_, step.flags(), bytes(at));
      const int stage = Rings::second_stage(slot_++);
      s_.plan.load(n, at, s_.q[stage], p_.q, &QueryPlan::Origins::second, full);
      bulk_load(s_.lse[stage], stats(n, i).lse, kStatBytes, full);
    }
    VSA_DEVICE int bytes(const TilePlace& at) const {
      return p_.queries.box_rows(at) * D * 2 + kStatBytes;
    }

    static constexpr int kStatBytes = kTileRows * sizeof(float);
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
        if constexpr (Config::kKeysInRegisters) {
          if (item.tile >= 0) {
            read_tile(k_, s_.k[w_]);
            read_tile(v_, s_.v[w_]);
          }
        }
        gather();
        if (item.tile >= 0) store(item);
      });
      if (elect_one()) bulk_wait<0>();
    }

   private:
    VSA_DEVICE void gather() {
      fill(grad_k_, 0.f);
      fill(grad_v_, 0.f);
      const auto wait = [&](const Stop& stop) { wait_queries(stop); };
      Stop held = stops_.first();
      while (held.is(Stop::kOwn)) {
        wait_queries(held);
        issue_scores(held);
        wgmma_wait<0>(scores_);
        weigh(held);
        s_.rings.wait_first(held);
        differentiate(held);
        Stop next = stops_.own(stops_.take(), wait);
        while (next.is(Stop::kOwn)) {
          issue_scores(next);
          issue_grad_k(held);
          const Stop after = stops_.take();
          wgmma_wait<1>(scores_);
          weigh(next);
          s_.rings.wait_first(next);
          wgmma_wait<0>(grad_k_);
          s_.rings.release_second(held);
          const bool there = after.is(Stop::kOwn) && s_.rings.has_second(after);
          differentiate(next);
          held = next;
          next = there ? after : stops_.own(after, wait);
        }
        issue_grad_k(held);
        wgmma_wait<0>(grad_k_);
        s_.rings.release_second(held);
        held = stops_.next_run(next);
      }
      stops_.end_item();
    }

    VSA_DEVICE void wait_queries(const Stop& stop) {
      s_.rings.wait_together(stop);
      s_.rings.wait_second(stop);
    }
    VSA_DEVICE void issue_scores(const Stop& stop) {
      if constexpr (Config::kKeysInRegisters)
        mma_ABt<Element>(scores_, k_, s_.q[stop.second().stage]);
      else
        mma_ABt<Element>(scores_, s_.k[unhoisted(w_)], s_.q[stop.second().stage]);
      wgmma_commit();
    }
    VSA_DEVICE void issue_grad_k(const Stop& stop) {
      mma_AB<Element>(grad_k_, rounded_, s_.q[stop.second().stage]);
      wgmma_commit();
    }
    VSA_DEVICE void weigh(const Stop& stop) {
      const float scale = p_.scale_log2;
      map_columns(scores_, s_.lse[stop.second().stage],
                  [=](float x, float lse) { return exp2_approx(fma(x, scale, -lse)); });
    }
    // From weights to the gradients of scores, rounded. dV is complete afterwards.
    VSA_DEVICE void differentiate(const Stop& stop) {
      round_to<Element>(rounded_, scores_);
      if constexpr (Config::kKeysInRegisters)
        mma_ABt<Element>(grad_scores_, v_, s_.grad_out[stop.first().stage]);
      else
        mma_ABt<Element>(grad_scores_, s_.v[unhoisted(w_)], s_.grad_out[stop.first().stage]);
      wgmma_commit();
      mma_AB<Element>(grad_v_, rounded_, s_.grad_out[stop.first().stage]);
      wgmma_commit();
      wgmma_wait<1>(grad_scores_);
      map_columns(grad_scores_, s_.delta[stop.first().stage],
                  [](float x, float delta) { return x - delta; });
      zip(grad_scores_, scores_, [](float x, float weight) { return x * weight; });
      wgmma_wait<0>(grad_v_);
      s_.rings.release_first(stop);
      round_to<Element>(rounded_, grad_scores_);
    }

    VSA_DEVICE void store(const Assignment& item) {
      const TilePlace at = p_.keys.place(item.tile);
      const float scale = p_.scale;
      for_each(grad_k_, [=](float& x, int, int) { x *= scale; });
      if (at.region != Region::Video) {
        const uint64_t rows = p_.keys.rows(at, item.batch);
        for_each(grad_k_, [=](float& x, int row, int) { x = rows >> row & 1 ? x : 0.f; });
        for_each(grad_v_, [=](float& x, int row, int) { x = rows >> row & 1 ? x : 0.f; });
      }
      p_.grad_k_means.add_to(grad_k_, p_.keys, p_.kv_heads, item, at);
      p_.grad_v_means.add_to(grad_v_, p_.keys, p_.kv_heads, item, at);
      Operand<D> rounded;
      round_to<Element>(rounded, grad_k_);
      write_tile(s_.k[w_], rounded);
      round_to<Element>(rounded, grad_v_);
      write_tile(s_.v[w_], rounded);
      fence_async_proxy();
      named_sync(1 + w_, kWarpgroupThreads);
      if (elect_one()) {
        const TileBox grad_k = box_of(p_.grad_k, at, item.head, item.batch);
        const TileBox grad_v = box_of(p_.grad_v, at, item.head, item.batch);
        store_tile(grad_k.map, grad_k.at, s_.k[w_]);
        store_tile(grad_v.map, grad_v.at, s_.v[w_]);
        bulk_commit();
        bulk_wait_read<0>();
      }
    }

    const Params& p_;
    SharedMemory& s_;
    const int w_;
    Stops<QueryPlan, Rings> stops_;
    Fragment<64> scores_, grad_scores_;  // [keys, queries]
    Operand<D> k_, v_;
    Operand<64> rounded_;  // P^T, then dS^T
    Fragment<D> grad_k_, grad_v_;
  };

  VSA_DEVICE static void produce(const Params& p, SharedMemory& s, int which) {
    if (!elect_lane()) return;
    if (which == 0)
      Producer(p, s).run_keys();
    else if (which == 1)
      Producer(p, s).run_grad_out();
    else
      Producer(p, s).run_queries();
  }
  VSA_DEVICE static void consume(const Params& p, SharedMemory& s, int w) {
    Consumer(p, s, w).run();
  }
};

}  // namespace vsa
