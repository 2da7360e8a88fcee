// SPDX-License-Identifier: Apache-2.0
// Fine stage, backward, first pass: the gradients of keys and values.
//
//   P^T = 2^(scale K Q^T - LSE)      dV = P^T dO
//   dS^T = P^T (V dO^T - delta)      dK = scale dS^T Q
//
// The forward kernel with the roles changed: each consumer computes one key tile, whose gradients
// stay in registers; the scheduler reads the transposed bitmap, and producers load dO with delta
// and Q with its log-sum-exp of each query tile. Queries of all heads that share a key head come
// one head after the other. Scores are computed transposed, so that P^T and dS^T come out as the
// operands of the next products and never leave the registers.
//
//     scores(next)    dK += dS^T Q of the tile held    in flight together
//     read the step after next
//     wait for scores -> weights
//     wait for dK -> release Q(held)
//     look whether Q of the tile after next is there
//     dP(next)        dV += P^T dO                     in flight together
//     wait for dP -> dS
//     wait for dV -> release dO(next)
//
//   barriers   guard                                            see
//   resident   K and V, until dK and dV have been stored        kernels/schedule/resident_tiles.h
//   rings      dO with delta, Q with its log-sum-exp            kernels/schedule/rings.h
//   schedule   tile loads and the steps of each consumer        kernels/schedule/tile_schedule.h
//   sums       dQ, in the kernel of one pass                    kernels/fine/query_sums.h
#pragma once
#include "kernels/fine/query_sums.h"
#include "kernels/schedule/resident_tiles.h"
#include "kernels/schedule/rings.h"
#include "kernels/schedule/tile_scheduler.h"

namespace vsa {

template <class Element_, int D_>
struct FineBackwardKeysConfig {
  using Element = Element_;
  static constexpr int D = D_;
  static constexpr int kConsumers = 2;
  using Rings =  // of dO, of Q
      std::conditional_t<D == 128, TwoRings<4, 5, kConsumers>, OneRing<11, kConsumers>>;
  static constexpr int kScheduleWords = 8, kChunkLoads = D == 128 ? 96 : 64;
  // Of a consumer's registers, 64 x 64 numbers in fp32 take 32. At 128, dK and dV take 64 each, S^T
  // and dP^T 32 each, and P^T, later dS^T, 16: 208 of 240. At 64 it is 144 of 232, and K and V find
  // room, 16 each: products with both operands in shared memory are limited by reading them
  // (bench/log/backward-passes.md).
  static constexpr bool kKeysInRegisters = D == 64;
  // Three warpgroups have 3 x 168 registers per thread, so that the one of producers and scheduler
  // keeps what two consumers leave. 240 is the most that a consumer is given, 24 the least.
  static constexpr int kProducerRegisters = D == 128 ? 24 : 40;
  static constexpr int kConsumerRegisters = D == 128 ? 240 : 232;
  using Sums = NoQuerySums;
};

// The backward in one pass: dS^T goes to a reducer as well, which makes dQ of it. Two key tiles
// meet in the queries that both were selected by, so those come first.
template <class Element, int D>
struct FineBackwardOnePassConfig : FineBackwardKeysConfig<Element, D> {
  static_assert(D == 64, "at 128 registers do not suffice for a reducer");
  using Rings = OneRing<5, 2>;
  using Sums = QuerySums<2, 4>;
  // Four warpgroups share 512 registers per thread.
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 208;
  static constexpr int kReducerRegisters = 72;
};

template <class Config>
struct FineBackwardKeys : ReducerOf<Config, Config::Sums::kThere> {
  using Element = typename Config::Element;
  using Params = FineBackwardParams;
  static constexpr int D = Config::D;
  static constexpr int kConsumers = Config::kConsumers;
  using Sums = typename Config::Sums;
  static constexpr int kComputing = kConsumers + Sums::kThere;  // warpgroups
  static constexpr int kThreads = (kComputing + 1) * kWarpgroupThreads;
  // The first loads keys and values.
  enum Producers { kKeyProducer, kGradOutProducer, kQueryProducer, kProducers };
  static constexpr int kProducerRegisters = Config::kProducerRegisters;
  static constexpr int kConsumerRegisters = Config::kConsumerRegisters;
  using QuerySchedule = TileSchedule<kConsumers, Config::kChunkLoads>;
  using Rings = typename Config::Rings;

  struct SharedMemory {
    Tile<D> k[kConsumers];  // also where the gradients leave from
    Tile<D> v[kConsumers];
    Tile<D> grad_out[Rings::kFirst];
    Tile<D> q[Rings::kSecond];
    alignas(16) float delta[Rings::kFirst][kTileRows];  // travels with dO
    alignas(16) float lse[Rings::kSecond][kTileRows];   // travels with Q
    Rings rings;
    QuerySchedule schedule;
    ResidentTiles<kConsumers> resident;
    [[no_unique_address]] Sums sums;
  };

  VSA_DEVICE static void init_barriers(SharedMemory& s) {
    s.rings.init();
    s.schedule.init(kProducers, kComputing);
    s.resident.init();
    s.sums.init();
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

  // The longest columns first. The query heads that share a key head come one after the other.
  VSA_DEVICE static void schedule(const Params& p, SharedMemory& s) {
    TileScheduler<kConsumers, Config::kScheduleWords, Config::kChunkLoads, Rings::kFirst,
                  Rings::kSecond, PaddableSequence, Sums::kThere>
        scheduler(s.schedule, p.keys, p.queries, p.grad_out, p.q);
    const WorkList list(p.keys, kConsumers, p.batch, p.kv_heads, p.key_axes, p.key_order);
    const int tiles = p.keys.grid.num_tiles(), words = bitmap::words(p.queries.grid.num_tiles());
    const int sharing = p.heads / p.kv_heads;
    list.take_each(p.key_tile_counter, kConsumers, [&](const WorkTile& work) {
      const int head = work.head * sharing;
      scheduler.add(work, bitmap_of(p.transposed_bitmap, work.batch, p.heads, head, tiles, words),
                    head, sharing);
    });
    scheduler.finish();
  }

  class Producer {
   public:
    VSA_DEVICE Producer(const Params& p, SharedMemory& s) : p_(p), s_(s) {}

    VSA_DEVICE void run_keys() {
      prefetch_map(p_.k.video.map);
      prefetch_map(p_.v.video.map);
      s_.resident.load_work_tiles(
          s_.schedule, p_.keys,
          [&](int w, const WorkTile& work, const TilePlace& at, Mbarrier& full) {
            const TileBox k = box_of(p_.k, at, work.head, work.batch);
            const TileBox v = box_of(p_.v, at, work.head, work.batch);
            full.arrive_expect_tx(2 * p_.keys.box_rows(at) * D * kElementBytes);
            load_tile(s_.k[w], k.map, k.at, full, CacheHint::EvictFirst);
            load_tile(s_.v[w], v.map, v.at, full, CacheHint::EvictFirst);
          });
    }
    VSA_DEVICE void run_grad_out() {
      prefetch_map(p_.grad_out.video.map);
      s_.schedule.for_each_load([&](int n, int i) { load_grad_out(n, i); });
    }
    VSA_DEVICE void run_queries() {
      prefetch_map(p_.q.video.map);
      s_.schedule.for_each_load([&](int n, int i) { load_query(n, i); });
    }

   private:
    // Rows that are no tokens need no mask: their statistics make them weigh nothing.
    VSA_DEVICE const RowStats& stats(int n, int i) const {
      const auto chunk = s_.schedule.chunk(n);
      return p_.stats(chunk.work.batch, chunk.head, s_.schedule.tile_load(n, i).tile(p_.queries));
    }
    VSA_DEVICE void load_grad_out(int n, int i) {
      const TileLoad load = s_.schedule.tile_load(n, i);
      const TilePlace at = load.place(p_.queries);
      Mbarrier& full = s_.rings.acquire_first(number_, load.flags(), bytes(at));
      const int stage = Rings::first_stage(number_++);
      s_.schedule.load(n, at, s_.grad_out[stage], p_.grad_out, &QuerySchedule::Origins::first,
                       full);
      bulk_load(s_.delta[stage], stats(n, i).delta, kStatBytes, full);
    }
    VSA_DEVICE void load_query(int n, int i) {
      const TileLoad load = s_.schedule.tile_load(n, i);
      const TilePlace at = load.place(p_.queries);
      Mbarrier& full = s_.rings.acquire_second(number_, load.flags(), bytes(at));
      const int stage = Rings::second_stage(number_++);
      s_.schedule.load(n, at, s_.q[stage], p_.q, &QuerySchedule::Origins::second, full);
      bulk_load(s_.lse[stage], stats(n, i).lse, kStatBytes, full);
    }
    VSA_DEVICE int bytes(const TilePlace& at) const {
      return p_.queries.box_rows(at) * D * kElementBytes + kStatBytes;
    }

    static constexpr int kStatBytes = kTileRows * sizeof(float);
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
        if constexpr (Sums::kThere)
          rows_ = work.tile < 0 ? 0 : p_.keys.rows(p_.keys.place(work.tile), work.batch);
        if constexpr (Config::kKeysInRegisters) {
          if (work.tile >= 0) {
            read_tile(k_, s_.k[w_]);
            read_tile(v_, s_.v[w_]);
          }
        }
        mainloop();
        if (work.tile >= 0) store(work);
      });
      if (elect_one()) bulk_wait<0>();
    }

   private:
    VSA_DEVICE void mainloop() {
      fill(grad_k_, 0.f);
      fill(grad_v_, 0.f);
      const auto wait = [&](const ConsumerStep& step) { wait_queries(step); };
      ConsumerStep held = steps_.first();
      while (held.is(ConsumerStep::kCompute)) {
        wait_queries(held);
        issue_scores(held);
        wgmma_wait<0>(scores_);
        weigh(held);
        wait_first(held);
        wait_room();
        differentiate(held);
        hand_over();
        ConsumerStep next = steps_.next_compute(steps_.take(), wait);
        while (next.is(ConsumerStep::kCompute)) {
          issue_scores(next);
          issue_grad_k(held);
          hand_over();
          const ConsumerStep after = steps_.take();
          wgmma_wait<1>(scores_);
          weigh(next);
          wait_first(next);
          wait_room();
          wgmma_wait<0>(grad_k_);
          s_.rings.release_second(held);
          const bool there = after.is(ConsumerStep::kCompute) && s_.rings.has_second(after);
          differentiate(next);
          held = next;
          if (!there) hand_over();
          next = there ? after : steps_.next_compute(after, wait);
        }
        issue_grad_k(held);
        wgmma_wait<0>(grad_k_);
        s_.rings.release_second(held);
        held = steps_.resume(next);
      }
      steps_.end_work_tile();
    }

    VSA_DEVICE void wait_queries(const ConsumerStep& step) {
      if constexpr (Rings::kTogether)
        s_.rings.wait_both(step);
      else
        s_.rings.wait_second(step);
    }
    // With one ring dO comes with its Q, and goes with it.
    VSA_DEVICE void wait_first(const ConsumerStep& at) {
      if constexpr (!Rings::kTogether) s_.rings.wait_first(at);
    }
    VSA_DEVICE void release_first(const ConsumerStep& at) {
      if constexpr (!Rings::kTogether) s_.rings.release_first(at);
    }
    // Asked for before products are waited for: ptxas keeps exponentials above a loop.
    VSA_DEVICE void wait_room() {
      if constexpr (Sums::kThere) s_.sums.wait_room(w_, put_);
    }
    // While products run, for the fence waits for the stores before it; but before waiting for
    // anything, or the reducer and what waits for it might be waited for.
    VSA_DEVICE void hand_over() {
      if constexpr (Sums::kThere) {
        if (put_ == made_) return;
        s_.sums.hand_over(w_, made_++);
      }
    }
    VSA_DEVICE void issue_scores(const ConsumerStep& step) {
      if constexpr (Config::kKeysInRegisters)
        mma_ABt<Element>(scores_, k_, s_.q[step.second().stage]);
      else
        mma_ABt<Element>(scores_, s_.k[no_hoist(w_)], s_.q[step.second().stage]);
      wgmma_commit();
    }
    VSA_DEVICE void issue_grad_k(const ConsumerStep& step) {
      mma_AB<Element>(grad_k_, rounded_, s_.q[step.second().stage]);
      wgmma_commit();
    }
    VSA_DEVICE void weigh(const ConsumerStep& step) {
      const float scale = p_.scale_log2;
      map_columns(scores_, s_.lse[step.second().stage],
                  [=](float x, float lse) { return exp2_approx(fma(x, scale, -lse)); });
    }
    // From weights to the gradients of scores, rounded. dV is complete afterwards.
    VSA_DEVICE void differentiate(const ConsumerStep& step) {
      round_to<Element>(rounded_, scores_);
      if constexpr (Config::kKeysInRegisters)
        mma_ABt<Element>(grad_scores_, v_, s_.grad_out[step.first().stage]);
      else
        mma_ABt<Element>(grad_scores_, s_.v[no_hoist(w_)], s_.grad_out[step.first().stage]);
      wgmma_commit();
      mma_AB<Element>(grad_v_, rounded_, s_.grad_out[step.first().stage]);
      wgmma_commit();
      wgmma_wait<1>(grad_scores_);
      map_columns(grad_scores_, s_.delta[step.first().stage],
                  [](float x, float delta) { return x - delta; });
      zip(grad_scores_, scores_, [](float x, float weight) { return x * weight; });
      wgmma_wait<0>(grad_v_);
      release_first(step);
      round_to<Element>(rounded_, grad_scores_);
      if constexpr (Sums::kThere) {
        // Rows that are no tokens have zeros for keys and values, but what they are multiplied by
        // may be infinite.
        if (rows_ != ~uint64_t{0}) keep_rows(rounded_, rows_);
        s_.sums.put(w_, put_++, rounded_);
      }
    }

    VSA_DEVICE void store(const Assignment& work) {
      const TilePlace at = p_.keys.place(work.tile);
      const float scale = p_.scale;
      for_each(grad_k_, [=](float& x, int, int) { x *= scale; });
      p_.grad_k_means.add_to(grad_k_, p_.keys, p_.kv_heads, work, at);
      p_.grad_v_means.add_to(grad_v_, p_.keys, p_.kv_heads, work, at);
      if (p_.keys.stores_padding(at)) {
        const uint64_t rows = p_.keys.rows(at, work.batch);
        for_each(grad_k_, [=](float& x, int row, int) { x = rows >> row & 1 ? x : 0.f; });
        for_each(grad_v_, [=](float& x, int row, int) { x = rows >> row & 1 ? x : 0.f; });
      }
      if constexpr (Sums::kThere) s_.sums.wait_used(w_, made_);
      Operand<D> rounded;
      round_to<Element>(rounded, grad_k_);
      write_tile(s_.k[w_], rounded);
      round_to<Element>(rounded, grad_v_);
      write_tile(s_.v[w_], rounded);
      fence_async_proxy();
      named_sync(consumer_barrier(w_), kWarpgroupThreads);
      if (elect_one()) {
        const TilePlace to = p_.keys.stored(at);
        const TileBox grad_k = box_of(p_.grad_k, to, work.head, work.batch);
        const TileBox grad_v = box_of(p_.grad_v, to, work.head, work.batch);
        store_tile(grad_k.map, grad_k.at, s_.k[w_]);
        store_tile(grad_v.map, grad_v.at, s_.v[w_]);
        bulk_commit();
        bulk_wait_read<0>();
      }
    }

    const Params& p_;
    SharedMemory& s_;
    const int w_;
    ConsumerSteps<QuerySchedule, Rings> steps_;
    uint64_t rows_ = ~uint64_t{0};       // of the key tile that are tokens
    int put_ = 0, made_ = 0;             // dS^T for the reducer: stored, handed over
    Fragment<64> scores_, grad_scores_;  // [keys, queries]
    Operand<D> k_, v_;
    Operand<64> rounded_;  // P^T, then dS^T
    Fragment<D> grad_k_, grad_v_;
  };

  VSA_DEVICE static void produce(const Params& p, SharedMemory& s, int which) {
    if (!elect_lane()) return;
    if (which == kKeyProducer)
      Producer(p, s).run_keys();
    else if (which == kGradOutProducer)
      Producer(p, s).run_grad_out();
    else
      Producer(p, s).run_queries();
  }
  VSA_DEVICE static void consume(const Params& p, SharedMemory& s, int w) {
    Consumer(p, s, w).run();
  }
  VSA_DEVICE static void reduce(const Params& p, SharedMemory& s) {
    QueryReducer<FineBackwardKeys>(p, s).run();
  }
};

static_assert(kBytesLeft<FineBackwardKeys<FineBackwardKeysConfig<Bf16, 128>>> < sizeof(Tile<128>) &&
                  kBytesLeft<FineBackwardKeys<FineBackwardKeysConfig<Bf16, 64>>> <
                      2 * sizeof(Tile<64>) &&
                  kBytesLeft<FineBackwardKeys<FineBackwardOnePassConfig<Bf16, 64>>> <
                      2 * sizeof(Tile<64>),
              "no further stage would fit");

}  // namespace vsa
