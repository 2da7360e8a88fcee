// SPDX-License-Identifier: Apache-2.0
// Fine stage, forward: out = softmax(scale Q K^T) V over the selected tiles, and its log-sum-exp.
//
// A block has a scheduler warp, three producer warps and several consumer warpgroups. Each consumer
// computes one query tile; theirs are neighbours in one head. The scheduler works out the union of
// their selections, and producers load K and V of each selected tile once for all consumers.
//
// Within a consumer the scores of the next tile are issued before the output of the one it holds,
// and softmax runs while the tensor cores work on the latter:
//
//     scores(next)  out += weights V(held)     in flight together
//     read the step after next
//     wait for scores -> release K(next) -> softmax
//     look whether K of the tile after next is there
//     wait for out -> release V(held) -> rescale out, round weights
//
//   barriers   guard                                            see
//   resident   Q, until out has been stored from its place      kernels/schedule/resident_tiles.h
//   rings      K and V of the selected tiles                    kernels/schedule/rings.h
//   schedule   tile loads and the steps of each consumer        kernels/schedule/tile_schedule.h
#pragma once
#include "kernels/fine/epilogue.h"
#include "kernels/fine/softmax.h"
#include "kernels/schedule/resident_tiles.h"
#include "kernels/schedule/rings.h"
#include "kernels/schedule/tile_scheduler.h"

namespace vsa {

template <class Element_, int D_>
struct FineForwardConfig {
  using Element = Element_;
  static constexpr int D = D_;
  // Measured: three consumers with Q in shared memory beat two with Q in registers, and four beat
  // three where their registers are enough (bench/log/forward-kernel.md).
  static constexpr int kConsumers = D == 128 ? 3 : 4;
  // Channels of Q that consumers hold in registers too, so that products read less of shared
  // memory: as many as there is room for (bench/log/held-queries.md).
  static constexpr int kHeldChannels = D == 128 ? 48 : 0;
  // Of K, of V. At 64 one ring has stages enough, and half as many waits
  // (bench/log/forward-kernel.md).
  using Rings = std::conditional_t<D == 128, TwoRings<4, 6, kConsumers>, OneRing<11, kConsumers>>;
  static constexpr int kScheduleWords = 8, kChunkLoads = D == 128 ? 96 : 64;
  // Producers and the scheduler warp share a warpgroup, which has what consumers leave of a launch:
  // 4 x 128 registers per thread at 128, 5 x 96 at 64.
  static constexpr int kProducerRegisters = D == 128 ? 56 : 32;
  static constexpr int kConsumerRegisters = D == 128 ? 152 : 112;
};

// Epilogue: what becomes of the output before it is stored (kernels/fine/epilogue.h).
template <class Config, class Epilogue = PlainOutput>
struct FineForward {
  using Element = typename Config::Element;
  using Params = typename Epilogue::Params;
  static constexpr int D = Config::D;
  static constexpr int kConsumers = Config::kConsumers;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads;
  enum Producers { kQueryProducer, kKeyProducer, kValueProducer, kProducers };
  static constexpr int kProducerRegisters = Config::kProducerRegisters;
  static constexpr int kConsumerRegisters = Config::kConsumerRegisters;
  using KeySchedule = TileSchedule<kConsumers, Config::kChunkLoads>;
  using Rings = typename Config::Rings;

  struct SharedMemory {
    Tile<D> q[kConsumers];  // also where the output leaves from
    Tile<D> k[Rings::kFirst];
    Tile<D> v[Rings::kSecond];
    Rings rings;
    KeySchedule schedule;
    ResidentTiles<kConsumers> resident;
  };

  VSA_DEVICE static void init_barriers(SharedMemory& s) {
    s.rings.init();
    s.schedule.init(kProducers);
    s.resident.init();
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

  VSA_DEVICE static void schedule(const Params& p, SharedMemory& s) {
    TileScheduler<kConsumers, Config::kScheduleWords, Config::kChunkLoads, Rings::kFirst,
                  Rings::kSecond, PaddableSequence>
        scheduler(s.schedule, p.queries, p.keys, p.k, p.v);
    scheduler.add_query_tiles(p, p.tile_counter, p.order);
    scheduler.finish();
  }

  class Producer {
   public:
    VSA_DEVICE Producer(const Params& p, SharedMemory& s) : p_(p), s_(s) {}

    VSA_DEVICE void run_queries() {
      prefetch_map(p_.q.video.map);
      s_.resident.load_work_tiles(
          s_.schedule, p_.queries,
          [&](int w, const WorkTile& work, const TilePlace& at, Mbarrier& full) {
            const TileBox q = box_of(p_.q, at, work.head, work.batch);
            full.arrive_expect_tx(p_.queries.box_rows(at) * D * kElementBytes);
            load_tile(s_.q[w], q.map, q.at, full, CacheHint::EvictFirst);
          });
    }
    VSA_DEVICE void run_keys() {
      prefetch_map(p_.k.video.map);
      s_.schedule.for_each_load([&](int n, int i) { load_keys(n, i); });
    }
    VSA_DEVICE void run_values() {
      prefetch_map(p_.v.video.map);
      s_.schedule.for_each_load([&](int n, int i) { load_values(n, i); });
    }

   private:
    VSA_DEVICE void load_keys(int n, int i) {
      const TileLoad load = s_.schedule.tile_load(n, i);
      const TilePlace at = load.place(p_.keys);
      Mbarrier& full =
          s_.rings.acquire_first(number_, load.flags(), p_.keys.box_rows(at) * D * kElementBytes);
      s_.schedule.load(n, at, s_.k[Rings::first_stage(number_++)], p_.k,
                       &KeySchedule::Origins::first, full);
    }
    VSA_DEVICE void load_values(int n, int i) {
      const TileLoad load = s_.schedule.tile_load(n, i);
      const TilePlace at = load.place(p_.keys);
      Mbarrier& full =
          s_.rings.acquire_second(number_, load.flags(), p_.keys.box_rows(at) * D * kElementBytes);
      s_.schedule.load(n, at, s_.v[Rings::second_stage(number_++)], p_.v,
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
        if constexpr (kHeldChannels > 0)
          if (work.tile >= 0) read_tile(held_queries_, s_.q[w_]);
        mainloop();
        if (work.tile >= 0) store(work);
      });
      if (elect_one()) bulk_wait<0>();
    }

   private:
    static constexpr int kHeldChannels = Config::kHeldChannels;
    struct Nothing {};
    using HeldQueries = std::conditional_t<kHeldChannels == 0, Nothing, Operand<kHeldChannels>>;

    VSA_DEVICE void mainloop() {
      fill(out_, 0.f);
      softmax_.reset();
      const auto wait = [&](const ConsumerStep& step) { wait_keys(step); };
      ConsumerStep held = steps_.first();
      while (held.is(ConsumerStep::kCompute)) {
        start(held);
        ConsumerStep next = steps_.next_compute(steps_.take(), wait);
        while (next.is(ConsumerStep::kCompute)) {
          issue_scores(next);
          issue_output(held);
          ConsumerStep after = steps_.take();
          wgmma_wait<1>(scores_);
          release_first(next);
          weigh(next);
          // A real branch between the waits: without one, ptxas hoists the second above softmax.
          wait_second(next);
          after = steps_.past_chunk_end(after);
          const bool there = after.is(ConsumerStep::kCompute) && s_.rings.has_first(after);
          wgmma_wait<0>(out_);
          s_.rings.release_second(held);
          softmax_.rescale(out_);
          round_to<Element>(weights_, scores_);
          held = next;
          next = there ? after : steps_.next_compute(after, wait);
        }
        issue_output(held);
        wgmma_wait<0>(out_);
        s_.rings.release_second(held);
        held = steps_.resume(next);
      }
      steps_.end_work_tile();
    }

    VSA_DEVICE void wait_keys(const ConsumerStep& step) {
      if constexpr (Rings::kTogether)
        s_.rings.wait_both(step);
      else
        s_.rings.wait_first(step);
    }
    // With one ring V comes with its K, and K goes with its V.
    VSA_DEVICE void wait_second(const ConsumerStep& at) {
      if constexpr (!Rings::kTogether) s_.rings.wait_second(at);
    }
    VSA_DEVICE void release_first(const ConsumerStep& at) {
      if constexpr (!Rings::kTogether) s_.rings.release_first(at);
    }
    // The first tile of a run: nothing else is in flight.
    VSA_DEVICE void start(const ConsumerStep& step) {
      wait_keys(step);
      issue_scores(step);
      wgmma_wait<0>(scores_);
      release_first(step);
      weigh(step);
      softmax_.rescale(out_);
      round_to<Element>(weights_, scores_);
      wait_second(step);
    }
    VSA_DEVICE void issue_scores(const ConsumerStep& step) {
      const Tile<D>& k = s_.k[step.first().stage];
      if constexpr (kHeldChannels > 0)
        mma_ABt<Element>(scores_, held_queries_, s_.q[w_], k);
      else
        mma_ABt<Element>(scores_, s_.q[w_], k);
      wgmma_commit();
    }
    VSA_DEVICE void issue_output(const ConsumerStep& step) {
      mma_AB<Element>(out_, weights_, s_.v[step.second().stage]);
      wgmma_commit();
    }
    VSA_DEVICE void weigh(const ConsumerStep& step) {
      mask_columns(scores_, step.rows);
      softmax_.weigh(scores_, p_.scale);
    }

    VSA_DEVICE void store(const Assignment& work) {
      RowValues lse;
      softmax_.finish(out_, lse, p_.scale);
      const TilePlace at = p_.queries.place(work.tile);
      const uint64_t rows = p_.queries.rows(at, work.batch);
      if (p_.queries.stores_padding(at))
        for_each(out_, [=](float& x, int row, int) { x = rows >> row & 1 ? x : 0.f; });
      Epilogue::template finish<Element>(out_, p_, work, at, rows, [&](const TokenTensor& to) {
        write(to, at, work);
        named_sync(consumer_barrier(w_), kWarpgroupThreads);  // the tile is free again
      });
      write(p_.out, at, work);
      const int64_t head = int64_t{work.batch} * p_.heads + work.head;
      float* to = p_.lse + head * p_.queries.grid.num_tokens();
      for_each_row(lse, [&](float x, int row) {
        const int token = p_.queries.token(at, row);
        if (token >= 0) to[token] = rows >> row & 1 ? x : -INFINITY;
      });
    }

    // The tile of the output through the place of q.
    VSA_DEVICE void write(const TokenTensor& to, const TilePlace& at, const Assignment& work) {
      Operand<D> rounded;
      round_to<Element>(rounded, out_);
      write_tile(s_.q[w_], rounded);
      fence_async_proxy();
      named_sync(consumer_barrier(w_), kWarpgroupThreads);
      if (elect_one()) {
        const TileBox box = box_of(to, p_.queries.stored(at), work.head, work.batch);
        store_tile(box.map, box.at, s_.q[w_]);
        bulk_commit();
        bulk_wait_read<0>();
      }
    }

    const Params& p_;
    SharedMemory& s_;
    const int w_;
    ConsumerSteps<KeySchedule, Rings> steps_;
    Softmax softmax_;
    HeldQueries held_queries_;
    Fragment<64> scores_;
    Operand<64> weights_;
    Fragment<D> out_;
  };

  VSA_DEVICE static void produce(const Params& p, SharedMemory& s, int which) {
    if (!elect_lane()) return;
    if (which == kQueryProducer)
      Producer(p, s).run_queries();
    else if (which == kKeyProducer)
      Producer(p, s).run_keys();
    else
      Producer(p, s).run_values();
  }
  VSA_DEVICE static void consume(const Params& p, SharedMemory& s, int w) {
    Consumer(p, s, w).run();
  }
};

static_assert(kBytesLeft<FineForward<FineForwardConfig<Bf16, 128>>> < sizeof(Tile<128>) &&
                  kBytesLeft<FineForward<FineForwardConfig<Bf16, 64>>> < 2 * sizeof(Tile<64>),
              "no further stage would fit");

}  // namespace vsa
