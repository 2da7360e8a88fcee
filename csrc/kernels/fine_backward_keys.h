// SPDX-License-Identifier: Apache-2.0
// Fine stage, backward, first pass: the gradients of keys and values.
//
//   P^T = 2^(scale K Q^T - LSE)      dV = P^T dO
//   dS^T = P^T (V dO^T - delta)      dK = scale dS^T Q
//
// The forward kernel with the roles changed: consumers own neighbouring key tiles, whose gradients
// stay in registers; the planner walks the transposed selection, and the producer loads Q, dO and
// the row statistics of each query tile. Queries of all heads that share a key head come one head
// after the other. Scores are computed transposed, so that P^T and dS^T come out as the operands of
// the next products and never leave the registers.
//
//     scores(next)    dK += dS^T Q of the slot held    in flight together
//     wait for scores -> weights -> look for the slot after next
//     wait for dK -> release held
//     dP(next)        dV += P^T dO                     in flight together
//     wait for dP -> dS
//     wait for dV
//
//   barrier   arrives                                     waits
//   kv_full   producer, and the bytes of K and V          its consumer
//   kv_empty  all of its consumer, once dK, dV have left  producer
//   slots     see kernels/slots.h
//   plan      see kernels/plan.h
#pragma once
#include "kernels/backward_params.h"
#include "kernels/plan.h"
#include "kernels/slots.h"

namespace vsa {

template <class Element_, int D_>
struct FineBackwardKeysConfig {
  using Element = Element_;
  static constexpr int D = D_;
  static constexpr int kConsumers = 2;
  static constexpr int kStages = D == 128 ? 5 : 11;
  static constexpr int kPlanWords = D == 128 ? 1 : 8, kPlanSteps = D == 128 ? 10 : 256;
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
  static constexpr int kStages = Config::kStages;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads;
  static constexpr int kProducerRegisters = Config::kProducerRegisters;
  static constexpr int kConsumerRegisters = Config::kConsumerRegisters;
  using QuerySlots = Slots<kStages, kConsumers>;
  using Slot = typename QuerySlots::Slot;
  using QueryPlan = Plan<Config::kPlanSteps>;

  struct SharedMemory {
    Tile<D> k[kConsumers];  // also where the gradients leave from
    Tile<D> v[kConsumers];
    Tile<D> q[kStages];
    Tile<D> grad_out[kStages];
    alignas(16) RowStats stats[kStages];
    QuerySlots slots;
    QueryPlan plan;
    Shared<Assignment> assignment[kConsumers];  // travels with K and V
    Mbarrier kv_full[kConsumers];
    Mbarrier kv_empty[kConsumers];
  };

  VSA_DEVICE static void init_barriers(SharedMemory& s) {
    s.slots.init();
    s.plan.init();
    for (int w = 0; w < kConsumers; ++w) {
      s.kv_full[w].init(1, "kv_full", w);
      s.kv_empty[w].init(kWarpgroupThreads, "kv_empty", w);
      label(s.assignment[w], "assignment", w);
      label(s.k[w], "k", w);
      label(s.v[w], "v", w);
    }
    for (int i = 0; i < kStages; ++i) {
      label(s.q[i], "q", i);
      label(s.grad_out[i], "grad_out", i);
      label(s.stats[i], "stats", i);
    }
  }

  VSA_DEVICE static void prologue(const Params& p, SharedMemory& s, int thread, int threads) {
    for (int w = 0; w < kConsumers; ++w) {
      zero_tail(s.k[w], p.keys.grid.tile.volume(), thread, threads);
      zero_tail(s.v[w], p.keys.grid.tile.volume(), thread, threads);
    }
    for (int i = 0; i < kStages; ++i) {
      zero_tail(s.q[i], p.queries.grid.tile.volume(), thread, threads);
      zero_tail(s.grad_out[i], p.queries.grid.tile.volume(), thread, threads);
    }
    fence_async_proxy();
  }

  // Columns differ in length, so blocks take items as they get done, the longest first within each
  // key head. The query heads that share it come one after the other.
  VSA_DEVICE static void plan(const Params& p, SharedMemory& s) {
    Planner<kConsumers, Config::kPlanWords, Config::kPlanSteps> planner(s.plan, p.keys, p.queries,
                                                                        p.q, p.grad_out);
    const WorkList list(p.keys, kConsumers, p.batch, p.kv_heads, p.key_axes);
    const int tiles = p.keys.grid.num_tiles(), words = bitmap::words(p.queries.grid.num_tiles());
    const int sharing = p.heads / p.kv_heads;
    const auto take = [&] { return first_lane([&] { return take_ticket(p.tickets); }); };
    for (int item = take(); item < list.items; item = take()) {
      Work work = list.work(item, kConsumers);
      work.first_place = load_global(p.order + item) * kConsumers;
      const int head = work.head * sharing;
      planner.add(work, bitmap_of(p.transposed, work.batch, p.heads, head, tiles, words), head,
                  sharing);
    }
    planner.stop();
  }

  class Producer {
   public:
    VSA_DEVICE Producer(const Params& p, SharedMemory& s) : p_(p), s_(s) {}

    VSA_DEVICE void run() {
      prefetch_map(p_.k.video.map);
      prefetch_map(p_.v.video.map);
      prefetch_map(p_.q.video.map);
      prefetch_map(p_.grad_out.video.map);
      int round = 0;
      for (int n = 0;; ++n) {
        const auto chunk = s_.plan.take(n);
        if (chunk.stop()) break;
        if (chunk.first()) {
          for (int w = 0; w < kConsumers; ++w) load_keys(chunk.work, w, round);
          ++round;
        }
        if (chunk.steps == 0) s_.slots.post_nothing(slot_++);
        for (int i = 0; i < chunk.steps; ++i) load_queries(n, i);
        s_.plan.give_back(n);
      }
      for (int w = 0; w < kConsumers; ++w) assign(w, {0, 0, Assignment::kStop}, round).arrive_one();
    }

   private:
    // The barrier that what comes with it must arrive at.
    VSA_DEVICE Mbarrier& assign(int w, Assignment assignment, int round) {
      s_.kv_empty[w].wait(round - 1);
      s_.assignment[w].set(assignment);
      return s_.kv_full[w];
    }

    VSA_DEVICE void load_keys(const Work& work, int w, int round) {
      const int tile = tile_at(p_.keys, work.first_place + w, work.axis);
      Mbarrier& full = assign(w, {work.batch, work.head, tile}, round);
      if (tile < 0) return full.arrive_one();
      const TilePlace at = p_.keys.place(tile);
      const TileBox k = box_of(p_.k, at, work.head, work.batch);
      const TileBox v = box_of(p_.v, at, work.head, work.batch);
      full.arrive_expect_tx(2 * p_.keys.box_rows(at) * D * 2);
      load_tile(s_.k[w], k.map, k.at, full, CacheHint::EvictFirst);
      load_tile(s_.v[w], v.map, v.at, full, CacheHint::EvictFirst);
    }

    VSA_DEVICE void load_queries(int n, int i) {
      const int stage = s_.slots.ring.stage(slot_);
      const PlanStep step = s_.plan.step(n, i);
      const TilePlace at = step.place(p_.queries);
      const int bytes = 2 * p_.queries.box_rows(at) * D * 2 + static_cast<int>(sizeof(RowStats));
      // Rows that are no tokens need no mask: their statistics make them weigh nothing.
      Mbarrier& full = s_.slots.post(slot_++, step.flags(), ~uint64_t{0}, bytes);
      s_.plan.load(n, at, s_.q[stage], p_.q, s_.grad_out[stage], p_.grad_out, full);
      const auto chunk = s_.plan.chunk(n);
      bulk_load(&s_.stats[stage], &p_.stats(chunk.work.batch, chunk.head, step.tile(p_.queries)),
                sizeof(RowStats), full);
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
        s_.kv_full[w_].wait(round);
        const Assignment item = s_.assignment[w_].get();
        if (item.tile == Assignment::kStop) break;
        if constexpr (Config::kKeysInRegisters) {
          if (item.tile >= 0) {
            read_tile(k_, s_.k[w_]);
            read_tile(v_, s_.v[w_]);
          }
        }
        gather();
        if (item.tile >= 0) store(item);
        s_.kv_empty[w_].arrive_all();
      }
      if (elect_one()) bulk_wait<0>();
    }

   private:
    VSA_DEVICE void gather() {
      fill(grad_k_, 0.f);
      fill(grad_v_, 0.f);
      slots_.begin_item();
      Slot held = slots_.take_first();
      while (held.number >= 0) {
        issue_scores(held);
        wgmma_wait<0>(scores_);
        weigh(held);
        differentiate(held);
        Slot next = slots_.take_after(held);
        while (next.number >= 0) {
          issue_scores(next);
          issue_grad_k(held);
          wgmma_wait<1>(scores_);
          weigh(next);
          // Real branches between the waits: without one, ptxas hoists the second above `weigh`.
          const Slot after = slots_.take_after(held);
          wgmma_wait<0>(grad_k_);
          slots_.release(held);
          differentiate(next);
          held = next;
          next = after;
        }
        issue_grad_k(held);
        wgmma_wait<0>(grad_k_);
        slots_.release(held);
        held = next.number == QuerySlots::View::kFar ? slots_.take_first() : next;
      }
    }

    VSA_DEVICE void issue_scores(const Slot& slot) {
      if constexpr (Config::kKeysInRegisters)
        mma_ABt<Element>(scores_, k_, s_.q[slot.stage]);
      else
        mma_ABt<Element>(scores_, s_.k[unhoisted(w_)], s_.q[slot.stage]);
      wgmma_commit();
    }
    VSA_DEVICE void issue_grad_k(const Slot& slot) {
      mma_AB<Element>(grad_k_, rounded_, s_.q[slot.stage]);
      wgmma_commit();
    }
    VSA_DEVICE void weigh(const Slot& slot) {
      const float scale = p_.scale_log2;
      map_columns(scores_, s_.stats[slot.stage].lse,
                  [=](float x, float lse) { return exp2_approx(fma(x, scale, -lse)); });
    }
    // From weights to the gradients of scores, rounded. dV is complete afterwards.
    VSA_DEVICE void differentiate(const Slot& slot) {
      round_to<Element>(rounded_, scores_);
      if constexpr (Config::kKeysInRegisters)
        mma_ABt<Element>(grad_scores_, v_, s_.grad_out[slot.stage]);
      else
        mma_ABt<Element>(grad_scores_, s_.v[unhoisted(w_)], s_.grad_out[slot.stage]);
      wgmma_commit();
      mma_AB<Element>(grad_v_, rounded_, s_.grad_out[slot.stage]);
      wgmma_commit();
      wgmma_wait<1>(grad_scores_);
      map_columns(grad_scores_, s_.stats[slot.stage].delta,
                  [](float x, float delta) { return x - delta; });
      zip(grad_scores_, scores_, [](float x, float weight) { return x * weight; });
      wgmma_wait<0>(grad_v_);
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
    typename QuerySlots::View slots_;
    Fragment<64> scores_, grad_scores_;  // [keys, queries]
    Operand<D> k_, v_;
    Operand<64> rounded_;  // P^T, then dS^T
    Fragment<D> grad_k_, grad_v_;
  };

  VSA_DEVICE static void produce(const Params& p, SharedMemory& s) {
    if (elect_one()) Producer(p, s).run();
  }
  VSA_DEVICE static void consume(const Params& p, SharedMemory& s, int w) {
    Consumer(p, s, w).run();
  }
};

}  // namespace vsa
