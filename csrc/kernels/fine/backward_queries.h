// SPDX-License-Identifier: Apache-2.0
// Fine stage, backward, second pass: the gradient of the queries.
//
//   P = 2^(scale Q K^T - LSE)      dS = P (dO V^T - delta)      dQ = scale dS K
//
// The forward kernel's walk over the same selection, with dO beside Q and the log-sum-exp known
// beforehand, so that nothing is ever rescaled. dQ may be stored where dO lies: a tile of dO is
// read by one consumer, once, before it stores that tile of dQ.
//
//     scores(next)  dP(next)    dQ += dS K of the tile held    in flight together
//     read the step after next
//     wait for the first two -> release V(next) -> weights, dS
//     look whether V and K of the tile after next are there
//     wait for dQ -> release K(held) -> round dS
//
//   barriers   guard                                            see
//   resident   Q and dO, until dQ has been stored               kernels/schedule/resident_tiles.h
//   rings      V and K of the selected tiles                    kernels/schedule/rings.h
//   schedule   tile loads and the steps of each consumer        kernels/schedule/tile_schedule.h
#pragma once
#include "kernels/fine/backward_params.h"
#include "kernels/fine/softmax.h"
#include "kernels/schedule/resident_tiles.h"
#include "kernels/schedule/rings.h"
#include "kernels/schedule/tile_scheduler.h"

namespace vsa {

template <class Element_, int D_>
struct FineBackwardQueriesConfig {
  using Element = Element_;
  static constexpr int D = D_;
  static constexpr int kConsumers = D == 128 ? 2 : 3;
  using Rings =  // of V, of K
      std::conditional_t<D == 128, TwoRings<4, 6, kConsumers>, OneRing<10, kConsumers>>;
  // Chunks are small at 128: four resident tiles and ten stages leave 3,072 bytes for all else.
  static constexpr int kScheduleWords = D == 128 ? 2 : 8, kChunkLoads = D == 128 ? 20 : 64;
  // Of a consumer's registers, 64 x 64 numbers in fp32 take 32. At 128, S and dP take 32 each, dQ
  // 64 and dS 16, and Q and dO find room, 32 each: 208 of 240. At 64 it is 112 of 152 without them:
  // three consumers without beat two with them (bench/log/backward-passes.md).
  static constexpr bool kQueriesInRegisters = D == 128;
  // The warpgroup of producers and scheduler has what consumers leave of a launch: 3 x 168
  // registers per thread with two consumers, 4 x 128 with three.
  static constexpr int kProducerRegisters = kConsumers == 2 ? 24 : 56;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 240 : 152;
};

template <class Config>
struct FineBackwardQueries {
  using Element = typename Config::Element;
  using Params = FineBackwardParams;
  static constexpr int D = Config::D;
  static constexpr int kConsumers = Config::kConsumers;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads;
  // The first loads queries and dO.
  enum Producers { kQueryProducer, kValueProducer, kKeyProducer, kProducers };
  static constexpr int kProducerRegisters = Config::kProducerRegisters;
  static constexpr int kConsumerRegisters = Config::kConsumerRegisters;
  using KeySchedule = TileSchedule<kConsumers, Config::kChunkLoads>;
  using Rings = typename Config::Rings;

  struct SharedMemory {
    Tile<D> q[kConsumers];  // also where the gradient leaves from
    Tile<D> grad_out[kConsumers];
    Tile<D> v[Rings::kFirst];
    Tile<D> k[Rings::kSecond];
    Rings rings;
    KeySchedule schedule;
    ResidentTiles<kConsumers> resident;
  };

  VSA_DEVICE static void init_barriers(SharedMemory& s) {
    s.rings.init();
    s.schedule.init(kProducers);
    s.resident.init();
    for (int w = 0; w < kConsumers; ++w) {
      label(s.q[w], "q", w);
      label(s.grad_out[w], "grad_out", w);
    }
    for (int i = 0; i < Rings::kFirst; ++i) label(s.v[i], "v", i);
    for (int i = 0; i < Rings::kSecond; ++i) label(s.k[i], "k", i);
  }

  VSA_DEVICE static void prologue(const Params& p, SharedMemory& s, int thread, int threads) {
    for (int w = 0; w < kConsumers; ++w) {
      zero_tail(s.q[w], p.queries.grid.tile.volume(), thread, threads);
      zero_tail(s.grad_out[w], p.queries.grid.tile.volume(), thread, threads);
    }
    for (int i = 0; i < Rings::kFirst; ++i)
      zero_tail(s.v[i], p.keys.grid.tile.volume(), thread, threads);
    for (int i = 0; i < Rings::kSecond; ++i)
      zero_tail(s.k[i], p.keys.grid.tile.volume(), thread, threads);
    fence_async_proxy();
  }

  VSA_DEVICE static void schedule(const Params& p, SharedMemory& s) {
    TileScheduler<kConsumers, Config::kScheduleWords, Config::kChunkLoads, Rings::kFirst,
                  Rings::kSecond, PaddableSequence>
        scheduler(s.schedule, p.queries, p.keys, p.v, p.k);
    scheduler.add_query_tiles(p, p.query_tile_counter, p.query_order);
    scheduler.finish();
  }

  class Producer {
   public:
    VSA_DEVICE Producer(const Params& p, SharedMemory& s) : p_(p), s_(s) {}

    VSA_DEVICE void run_queries() {
      prefetch_map(p_.q.video.map);
      prefetch_map(p_.grad_out.video.map);
      s_.resident.load_work_tiles(
          s_.schedule, p_.queries,
          [&](int w, const WorkTile& work, const TilePlace& at, Mbarrier& full) {
            const TileBox q = box_of(p_.q, at, work.head, work.batch);
            const TileBox grad_out = box_of(p_.grad_out, at, work.head, work.batch);
            full.arrive_expect_tx(2 * p_.queries.box_rows(at) * D * kElementBytes);
            load_tile(s_.q[w], q.map, q.at, full, CacheHint::EvictFirst);
            load_tile(s_.grad_out[w], grad_out.map, grad_out.at, full, CacheHint::EvictFirst);
          });
    }
    VSA_DEVICE void run_values() {
      prefetch_map(p_.v.video.map);
      s_.schedule.for_each_load([&](int n, int i) { load_values(n, i); });
    }
    VSA_DEVICE void run_keys() {
      prefetch_map(p_.k.video.map);
      s_.schedule.for_each_load([&](int n, int i) { load_keys(n, i); });
    }

   private:
    VSA_DEVICE void load_values(int n, int i) {
      const TileLoad load = s_.schedule.tile_load(n, i);
      const TilePlace at = load.place(p_.keys);
      Mbarrier& full =
          s_.rings.acquire_first(number_, load.flags(), p_.keys.box_rows(at) * D * kElementBytes);
      s_.schedule.load(n, at, s_.v[Rings::first_stage(number_++)], p_.v,
                       &KeySchedule::Origins::first, full);
    }
    VSA_DEVICE void load_keys(int n, int i) {
      const TileLoad load = s_.schedule.tile_load(n, i);
      const TilePlace at = load.place(p_.keys);
      Mbarrier& full =
          s_.rings.acquire_second(number_, load.flags(), p_.keys.box_rows(at) * D * kElementBytes);
      s_.schedule.load(n, at, s_.k[Rings::second_stage(number_++)], p_.k,
                       &KeySchedule::Origins::second, full);
    }

    const Params& p_;
    SharedMemory& s_;
    int number_ = 0;  // of the next tile load
  };

  class Consumer {
   public:
    VSA_DEVICE Consumer(const Params& p, SharedMemory& s, int w)
        : p_(p), s_(s), w_(w), steps_(s.schedule, s.rings, w) {}

    VSA_DEVICE void run() {
      s_.resident.for_each_work_tile(w_, [&](const Assignment& work) {
        if (work.tile >= 0) read_stats(p_.stats(work.batch, work.head, work.tile));
        if constexpr (Config::kQueriesInRegisters) {
          if (work.tile >= 0) {
            read_tile(q_, s_.q[w_]);
            read_tile(grad_out_, s_.grad_out[w_]);
          }
        }
        mainloop();
        if (work.tile >= 0) store(work);
      });
      if (elect_one()) bulk_wait<0>();
    }

   private:
    VSA_DEVICE void read_stats(const RowStats& stats) {
      set_rows(lse_, [&](int row) { return load_global(stats.lse + row); });
      set_rows(delta_, [&](int row) { return load_global(stats.delta + row); });
    }

    VSA_DEVICE void mainloop() {
      fill(grad_q_, 0.f);
      const auto wait = [&](const ConsumerStep& step) { wait_tiles(step); };
      ConsumerStep held = steps_.first();
      while (held.is(ConsumerStep::kCompute)) {
        start(held);
        ConsumerStep next = steps_.next_compute(steps_.take(), wait);
        while (next.is(ConsumerStep::kCompute)) {
          issue_scores(next);
          issue_gradient(held);
          ConsumerStep after = steps_.take();
          wgmma_wait<1>(scores_, grad_scores_);
          release_first(next);
          differentiate(next);
          // A real branch between the waits: without one, ptxas hoists the second one above.
          after = steps_.past_chunk_end(after);
          const bool there = after.is(ConsumerStep::kCompute) && s_.rings.has_both(after);
          wgmma_wait<0>(grad_q_);
          s_.rings.release_second(held);
          round_to<Element>(rounded_, grad_scores_);
          held = next;
          next = there ? after : steps_.next_compute(after, wait);
        }
        issue_gradient(held);
        wgmma_wait<0>(grad_q_);
        s_.rings.release_second(held);
        held = steps_.resume(next);
      }
      steps_.end_work_tile();
    }

    VSA_DEVICE void wait_tiles(const ConsumerStep& step) {
      if constexpr (Rings::kTogether) {
        s_.rings.wait_both(step);
      } else {
        s_.rings.wait_first(step);
        s_.rings.wait_second(step);
      }
    }
    // With one ring V goes with its K.
    VSA_DEVICE void release_first(const ConsumerStep& at) {
      if constexpr (!Rings::kTogether) s_.rings.release_first(at);
    }
    // The first tile of a run: nothing else is in flight.
    VSA_DEVICE void start(const ConsumerStep& step) {
      wait_tiles(step);
      issue_scores(step);
      wgmma_wait<0>(scores_, grad_scores_);
      release_first(step);
      differentiate(step);
      round_to<Element>(rounded_, grad_scores_);
    }
    VSA_DEVICE void issue_scores(const ConsumerStep& step) {
      const Tile<D>& k = s_.k[step.second().stage];
      const Tile<D>& v = s_.v[step.first().stage];
      if constexpr (Config::kQueriesInRegisters) {
        mma_ABt<Element>(scores_, q_, k);
        mma_ABt<Element>(grad_scores_, grad_out_, v);
      } else {
        mma_ABt<Element>(scores_, s_.q[w_], k);
        mma_ABt<Element>(grad_scores_, s_.grad_out[w_], v);
      }
      wgmma_commit();
    }
    VSA_DEVICE void issue_gradient(const ConsumerStep& step) {
      mma_AB<Element>(grad_q_, rounded_, s_.k[step.second().stage]);
      wgmma_commit();
    }
    // Scores become weights, and the gradients of weights become gradients of scores.
    VSA_DEVICE void differentiate(const ConsumerStep& step) {
      const float scale = p_.scale_log2;
      mask_columns(scores_, step.rows);
      map_rows(scores_, lse_, [=](float x, float lse) { return exp2_approx(fma(x, scale, -lse)); });
      map_rows(grad_scores_, delta_, [](float x, float delta) { return x - delta; });
      zip(grad_scores_, scores_, [](float x, float weight) { return x * weight; });
    }

    VSA_DEVICE void store(const Assignment& work) {
      const TilePlace at = p_.queries.place(work.tile);
      const float scale = p_.scale;
      for_each(grad_q_, [=](float& x, int, int) { x *= scale; });
      p_.grad_q_means.add_to(grad_q_, p_.queries, p_.heads, work, at);
      if (p_.queries.stores_padding(at)) {
        const uint64_t rows = p_.queries.rows(at, work.batch);
        for_each(grad_q_, [=](float& x, int row, int) { x = rows >> row & 1 ? x : 0.f; });
      }
      Operand<D> rounded;
      round_to<Element>(rounded, grad_q_);
      write_tile(s_.q[w_], rounded);
      fence_async_proxy();
      named_sync(consumer_barrier(w_), kWarpgroupThreads);
      if (elect_one()) {
        const TileBox box = box_of(p_.grad_q, p_.queries.stored(at), work.head, work.batch);
        store_tile(box.map, box.at, s_.q[w_]);
        bulk_commit();
        bulk_wait_read<0>();
      }
    }

    const Params& p_;
    SharedMemory& s_;
    const int w_;
    ConsumerSteps<KeySchedule, Rings> steps_;
    RowValues lse_, delta_;
    Fragment<64> scores_, grad_scores_;  // [queries, keys]
    Operand<D> q_, grad_out_;
    Operand<64> rounded_;
    Fragment<D> grad_q_;
  };

  VSA_DEVICE static void produce(const Params& p, SharedMemory& s, int which) {
    if (!elect_lane()) return;
    if (which == kQueryProducer)
      Producer(p, s).run_queries();
    else if (which == kValueProducer)
      Producer(p, s).run_values();
    else
      Producer(p, s).run_keys();
  }
  VSA_DEVICE static void consume(const Params& p, SharedMemory& s, int w) {
    Consumer(p, s, w).run();
  }
};

static_assert(kBytesLeft<FineBackwardQueries<FineBackwardQueriesConfig<Bf16, 128>>> <
                      sizeof(Tile<128>) &&
                  kBytesLeft<FineBackwardQueries<FineBackwardQueriesConfig<Bf16, 64>>> <
                      2 * sizeof(Tile<64>),
              "no further stage would fit");

}  // namespace vsa
