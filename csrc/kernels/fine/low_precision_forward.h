// SPDX-License-Identifier: Apache-2.0
// Fine stage, forward, for inference: the work of kernels/fine/forward.h in eight bits.
//
//   q = round(Q / q_scale)    a scale for each row, by the consumer, into registers
//   scores = q k^T            integers, or halves of e4m3; kernels/coarse/quantise_tiles.h makes k,
//   v out = weights v           weights and v e4m3; one column more is the sum of the weights
//
// Blocks, work tiles and steps are those of forward.h, with one producer for keys and values: one
// copy brings both. Within a consumer:
//
//     scores(next)  out += weights V(held)     in flight together
//     read the step after next
//     wait for scores -> softmax
//     wait for out -> release the held tile -> rescale out, or add it to the total when due
//     pack weights
//
// The tensor cores cut e4m3 sums off at 13 bits below their largest term, so that long sums come
// out too small (prim/operand8.h). Every kPeriod tiles `out` is therefore added to a total, as
// halves, in the place that the output will leave from, and begins anew. Each thread keeps its own
// part there. The end of a run of tiles adds what is left.
//
//   barriers   guard                                            see
//   resident   Q, until it has been read, or out has left its   kernels/schedule/resident_tiles.h
//              place
//   ring       keys and values of the selected tiles            kernels/schedule/image_ring.h
//   schedule   tile loads and the steps of each consumer        kernels/schedule/tile_schedule.h
#pragma once
#include <cstddef>

#include "kernels/fine/epilogue.h"
#include "kernels/fine/low_precision_queries.h"
#include "kernels/fine/low_precision_softmax.h"
#include "kernels/fine/low_precision_total.h"
#include "kernels/schedule/image_ring.h"
#include "kernels/schedule/resident_tiles.h"
#include "kernels/schedule/tile_scheduler.h"

namespace vsa {

// Key: S8 or E4m3, what scores are made from
template <class Element_, int D_, class Key_ = S8>
struct LowPrecisionForwardConfig {
  using Element = Element_;
  using Key = Key_;
  static constexpr int D = D_;
  static constexpr int kConsumers = D == 128 ? 3 : 4;
  // Whether queries have a place of their own, so that the next ones come while the output leaves.
  // At 128 that would take three stages, which cost more (bench/log/low-precision.md).
  static constexpr bool kQueriesApart = D == 64;
  static constexpr int kStages = D == 128 ? 9 : 15;
  static constexpr int kScheduleWords = 8, kChunkLoads = D == 128 ? 96 : 64;
  static constexpr int kPeriod = 8;  // tiles whose sums the tensor cores keep
  // What consumers leave of a launch is little: the scheduler warp, which has time, spills.
  static constexpr int kProducerRegisters = 32;
  static constexpr int kConsumerRegisters = D == 128 ? 160 : 112;
};

// Params of an epilogue, and where the tiles are; k and v of the former are not used.
template <class Base>
struct LowPrecisionParams : Base {
  const unsigned char* images;  // [batch, kv_heads, tiles] of QuantisedTile<D>::kImageBytes
  const float* channels;        // [batch, kv_heads, 2, D]: means of K, scales of V
};

template <class Config, class Epilogue = PlainOutput>
struct LowPrecisionForward {
  using Element = typename Config::Element;
  using Key = typename Config::Key;
  using Params = LowPrecisionParams<typename Epilogue::Params>;
  static constexpr int D = Config::D;
  static constexpr int kConsumers = Config::kConsumers, kStages = Config::kStages;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads;
  enum Producers { kQueryProducer, kTileProducer, kProducers };
  static constexpr int kProducerRegisters = Config::kProducerRegisters;
  static constexpr int kConsumerRegisters = Config::kConsumerRegisters;
  using KeySchedule = TileSchedule<kConsumers, Config::kChunkLoads>;
  using Ring = ImageRing<kStages, kConsumers>;

  using Queries = LowPrecisionQueries<Element, D, Key>;
  using Total = LowPrecisionTotal<D>;
  static constexpr int kPlaces = Config::kQueriesApart ? 2 : 1;

  struct SharedMemory {
    Tile<D> places[kConsumers][kPlaces];
    QuantisedTile<D> kv[kStages];
    // What is needed too seldom for registers.
    typename Total::Rows totals[kConsumers];
    float of_mean[kConsumers][kTileRows];  // products of queries with the mean of K
    Ring ring;
    KeySchedule schedule;
    ResidentTiles<kConsumers> resident;

    VSA_DEVICE Tile<D>& queries(int w) { return places[w][0]; }
    // The total; also where the output leaves from.
    VSA_DEVICE Tile<D>& out(int w) { return places[w][kPlaces - 1]; }
  };

  VSA_DEVICE static void init_barriers(SharedMemory& s) {
    s.ring.init();
    s.schedule.init(kProducers);
    s.resident.init();
    for (int w = 0; w < kConsumers; ++w) {
      label(s.out(w), "out", w);
      if (Config::kQueriesApart) label(s.queries(w), "q", w);
    }
    for (int i = 0; i < kStages; ++i) {
      label(s.kv[i].k, "k", i);
      label(s.kv[i].v, "v", i);
      label(s.kv[i].scale, "scale", i);
    }
  }

  VSA_DEVICE static void prologue(const Params& p, SharedMemory& s, int thread, int threads) {
    for (int w = 0; w < kConsumers; ++w)
      zero_tail(s.queries(w), p.queries.grid.tile.volume(), thread, threads);
    fence_async_proxy();
  }

  VSA_DEVICE static void schedule(const Params& p, SharedMemory& s) {
    // Images are found without the origins of tensors, for which any will do.
    TileScheduler<kConsumers, Config::kScheduleWords, Config::kChunkLoads, kStages, kStages>
        scheduler(s.schedule, p.queries, p.keys, p.q, p.q);
    scheduler.add_query_tiles(p, p.tile_counter);
    scheduler.finish();
  }

  class Producer {
   public:
    VSA_DEVICE Producer(const Params& p, SharedMemory& s) : p_(p), s_(s) {}

    VSA_DEVICE void run_queries() {
      prefetch_map(p_.q.video.map);
      Sleeper schedule{s_.schedule};
      s_.resident.load_work_tiles(
          schedule, p_.queries,
          [&](int w, const WorkTile& work, const TilePlace& at, Mbarrier& full) {
            const TileBox q = box_of(p_.q, at, work.head, work.batch);
            full.arrive_expect_tx(p_.queries.box_rows(at) * D * kElementBytes);
            load_tile(s_.queries(w), q.map, q.at, full, CacheHint::EvictFirst);
          });
    }
    VSA_DEVICE void run_tiles() {
      s_.schedule.for_each_load([&](int n, int i) { load_image(n, i); });
    }

   private:
    // The schedule for who sleeps until there is another work tile, which takes no issue slots.
    struct Sleeper {
      KeySchedule& schedule;

      template <class Load>
      VSA_DEVICE void for_each_work_tile(Load load) {
        schedule.template for_each_work_tile<true>(load);
      }
    };

    VSA_DEVICE void load_image(int n, int i) {
      constexpr int kBytes = QuantisedTile<D>::kImageBytes;
      const TileLoad load = s_.schedule.tile_load(n, i);
      const auto of = s_.schedule.chunk(n);
      const int64_t head = int64_t{of.work.batch} * p_.kv_heads + of.head;
      const int64_t image = head * p_.keys.num_tiles() + load.tile(p_.keys);
      Mbarrier& full = s_.ring.acquire(number_, load.flags(), kBytes);
      bulk_load(&s_.kv[Ring::stage(number_++)], p_.images + image * kBytes, kBytes, full,
                Layout::Any);
    }

    const Params& p_;
    SharedMemory& s_;
    int number_ = 0;  // of the next tile load
  };

  class Consumer {
   public:
    VSA_DEVICE Consumer(const Params& p, SharedMemory& s, int w)
        : p_(p),
          s_(s),
          w_(w),
          first_keys_(bytes_descriptor<D>(s.kv[0].k.address(), 0)),
          steps_(s.schedule, s.ring, w) {}

    VSA_DEVICE void run() {
      const auto read = [&](const Assignment& work) {
        if (work.tile < 0) return;
        Queries::read(q_, q_scale_, s_.of_mean[w_], s_.queries(w_), channels(work), p_.scale);
      };
      const auto work_on = [&](const Assignment& work) {
        if (work.tile >= 0) {
          let_output_leave();
          Total::clear(s_.out(w_), s_.totals[w_]);
        }
        mainloop();
        if (work.tile >= 0) store(work);
      };
      if constexpr (Config::kQueriesApart) {
        s_.resident.for_each_work_tile(w_, read, work_on);
      } else {
        s_.resident.for_each_work_tile(w_, [&](const Assignment& work) {
          read(work);
          work_on(work);
          if (elect_one()) bulk_wait_read<0>();
        });
      }
      if (elect_one()) bulk_wait<0>();
    }

   private:
    VSA_DEVICE const float* channels(const Assignment& work) const {
      const int head = work.head / (p_.heads / p_.kv_heads);
      return p_.channels + (int64_t{work.batch} * p_.kv_heads + head) * 2 * D;
    }

    VSA_DEVICE void mainloop() {
      softmax_.reset();
      const auto wait = [&](const ConsumerStep& step) { s_.ring.wait_both(step); };
      ConsumerStep held = steps_.first();
      while (held.is(ConsumerStep::kCompute)) {
        uint64_t held_keys = keys_of(held);
        start(held, held_keys);
        ConsumerStep next = steps_.next_compute(steps_.take(), wait);
        bool there = next.is(ConsumerStep::kCompute);
        while (there) {
          const uint64_t keys = keys_of(next);
          issue_scores(keys);
          issue_output(held_keys);
          ConsumerStep after = steps_.take();
          const float scale = scale_of(next);
          wgmma_wait<1>(scores_);
          weigh(scale);
          // A real branch between the waits: without one, ptxas hoists the second above softmax.
          after = steps_.past_chunk_end(after);
          there = s_.ring.has_both(after, after.is(ConsumerStep::kCompute));
          finish_output(held);
          if (has_sums())
            softmax_.rescale(out_);
          else
            add_to_total(softmax_.factor());
          pack_weights();
          held = next;
          held_keys = keys;
          next = after;
          if (there) continue;
          next = steps_.next_compute(after, wait);
          there = next.is(ConsumerStep::kCompute);
        }
        issue_output(held_keys);
        finish_output(held);
        add_to_total(ones());
        held = steps_.resume(next);
      }
      steps_.end_work_tile();
    }

    // The first tile of a run: nothing else is in flight.
    VSA_DEVICE void start(const ConsumerStep& step, uint64_t keys) {
      s_.ring.wait_both(step);
      issue_scores(keys);
      const float scale = scale_of(step);
      wgmma_wait<0>(scores_);
      weigh(scale);
      pack_weights();
      tiles_ = 0;
    }
    // Descriptors of a stage. They are made once, from that of the first, and those of values from
    // those of the keys beside them, which is cheaper than from addresses.
    VSA_DEVICE uint64_t keys_of(const ConsumerStep& step) const {
      return advance(first_keys_, step.first().stage * sizeof(QuantisedTile<D>));
    }
    VSA_DEVICE static uint64_t values_beside(uint64_t keys) {
      constexpr uint64_t kHigh = bytes_descriptor<kHalfRowBytes>(0, 0) >> 32 << 32;
      return kHigh | static_cast<uint32_t>(advance(keys, offsetof(QuantisedTile<D>, v)));
    }
    VSA_DEVICE void issue_scores(uint64_t keys) {
      mma8_ABt<Key>(scores_, q_, keys);
      wgmma_commit();
    }
    VSA_DEVICE void issue_output(uint64_t keys) {
      mma8_ABt<E4m3>(out_, weights_, values_beside(keys), has_sums());
      wgmma_commit();
    }
    VSA_DEVICE void finish_output(const ConsumerStep& held) {
      wgmma_wait<0>(out_);
      s_.ring.release_second(held);
      ++tiles_;
    }
    VSA_DEVICE float scale_of(const ConsumerStep& step) const {
      const float& scale = s_.kv[step.first().stage].scale;
      note_read(&scale, sizeof scale, Layout::Any);
      return scale;
    }
    VSA_DEVICE void weigh(float k_scale) {
      RowValues both = q_scale_;
      zip(both, q_scale_, [=](float, float q_scale) { return q_scale * k_scale; });
      softmax_.weigh(codes_, scores_, both);
    }
    VSA_DEVICE void pack_weights() {
      VSA_EACH_LANE(t) {
        const auto& codes = lane(codes_, t);
        auto& fours = lane(weights_, t);
        VSA_UNROLL
        for (int r = 0; r < kTileRows / 8; ++r) fours[r] = four_codes(codes, r);
      }
    }

    // Whether out_ holds sums that the total does not.
    VSA_DEVICE bool has_sums() const { return tiles_ % Config::kPeriod != 0; }
    // factor: what out_ must be multiplied by to be relative to the maxima
    VSA_DEVICE void add_to_total(const RowValues& factor) {
      Total::add(s_.out(w_), s_.totals[w_], out_, softmax_.max(), factor);
    }
    VSA_DEVICE static RowValues ones() {
      RowValues values;
      fill(values, 1.f);
      return values;
    }

    VSA_DEVICE void store(const Assignment& work) {
      RowValues lse = softmax_.max();
      Fragment<D> out;
      Total::finish(out, lse, s_.out(w_), s_.totals[w_], s_.of_mean[w_], p_.scale,
                    channels(work) + D);
      named_sync(consumer_barrier(w_), kWarpgroupThreads);  // the total's place is free
      const TilePlace at = p_.queries.place(work.tile);
      const uint64_t rows = p_.queries.rows(at, work.batch);
      if (at.region != Region::Video)
        for_each(out, [=](float& x, int row, int) { x = rows >> row & 1 ? x : 0.f; });
      Epilogue::template finish<Element>(out, p_, work, at, rows, [&](const TokenTensor& to) {
        write(out, to, at, work);
        let_output_leave();
      });
      write(out, p_.out, at, work);
      const int64_t head = int64_t{work.batch} * p_.heads + work.head;
      float* to = p_.lse + head * p_.queries.grid.num_tokens();
      for_each_row(lse, [&](float x, int row) {
        const int token = p_.queries.token(at, row);
        if (token >= 0) to[token] = rows >> row & 1 ? x : -INFINITY;
      });
    }

    // The place of the output is free again.
    VSA_DEVICE void let_output_leave() {
      if (elect_one()) bulk_wait_read<0>();
      named_sync(consumer_barrier(w_), kWarpgroupThreads);
    }
    // The tile of the output on its way.
    VSA_DEVICE void write(const Fragment<D>& out,
                          const TokenTensor& to,
                          const TilePlace& at,
                          const Assignment& work) {
      Operand<D> rounded;
      round_to<Element>(rounded, out);
      write_tile(s_.out(w_), rounded);
      fence_async_proxy();
      named_sync(consumer_barrier(w_), kWarpgroupThreads);
      if (elect_one()) {
        const TileBox box = box_of(to, at, work.head, work.batch);
        store_tile(box.map, box.at, s_.out(w_));
        bulk_commit();
      }
    }

    const Params& p_;
    SharedMemory& s_;
    const int w_;
    const uint64_t first_keys_;  // descriptor of the first stage
    ConsumerSteps<KeySchedule, Ring> steps_;
    LowPrecisionSoftmax softmax_;
    Operand8<D> q_;
    RowValues q_scale_;  // with the scale of all scores
    Fragment<64, std::conditional_t<std::is_same_v<Key, S8>, int, Fp16>> scores_;
    LowPrecisionSoftmax::Codes codes_;
    Operand8<64> weights_;
    Fragment<D + kSumRows> out_;
    int tiles_;  // of the run that have entered out_, which begins anew every kPeriod
  };

  VSA_DEVICE static void produce(const Params& p, SharedMemory& s, int which) {
    if (!elect_lane()) return;
    if (which == kQueryProducer)
      Producer(p, s).run_queries();
    else
      Producer(p, s).run_tiles();
  }
  VSA_DEVICE static void consume(const Params& p, SharedMemory& s, int w) {
    Consumer(p, s, w).run();
  }
};

static_assert(kBytesLeft<LowPrecisionForward<LowPrecisionForwardConfig<Bf16, 128>>> <
                      sizeof(QuantisedTile<128>) &&
                  kBytesLeft<LowPrecisionForward<LowPrecisionForwardConfig<Bf16, 64>>> <
                      sizeof(QuantisedTile<64>),
              "no further stage would fit");

}  // namespace vsa
