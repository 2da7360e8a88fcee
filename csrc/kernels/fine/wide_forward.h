// SPDX-License-Identifier: Apache-2.0
// Fine stage, forward, at a head_dim of 128: the work of kernels/fine/forward.h with two key tiles
// in one product.
//
// Two consumers hold their queries in registers. A load is a pair of tiles (pair_scheduler.h); the
// scores of both are one product of 128 columns, with one softmax step. A consumer whose product
// has its left operand in registers stays at it until the tensor cores have taken it, so one
// consumer multiplies while the other has its softmax, without being told to.
//
//     scores(next)  out += weights V(held)     in flight together
//     read the step after next
//     wait for scores -> release K(next) -> maxima
//     wait for out -> release V(held)
//     look whether K of the pair after next is there
//     rescale out, exponentials
//
//   barriers   guard                                            see
//   resident   Q, until out has been stored from its place      kernels/schedule/resident_tiles.h
//   rings      pairs of K and of V                              kernels/schedule/rings.h
//   schedule   pairs to load and the steps of each consumer     kernels/schedule/tile_schedule.h
#pragma once
#include "kernels/fine/epilogue.h"
#include "kernels/fine/softmax.h"
#include "kernels/schedule/pair_scheduler.h"
#include "kernels/schedule/resident_tiles.h"
#include "kernels/schedule/rings.h"

namespace vsa {

template <class Element_, int D_>
struct WideForwardConfig {
  using Element = Element_;
  static constexpr int D = D_;
  static constexpr int kStages = 3;  // of K, of V
  static constexpr int kScheduleWords = 16, kChunkPairs = 24;
};

// Epilogue: what becomes of the output before it is stored (kernels/fine/epilogue.h).
template <class Config, class Epilogue = PlainOutput>
struct WideForward {
  using Element = typename Config::Element;
  using Params = typename Epilogue::Params;
  static constexpr int D = Config::D, kStages = Config::kStages;
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads;
  enum Producers { kQueryProducer, kKeyProducer, kValueProducer, kProducers };
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  using KeySchedule = PairSchedule<kConsumers, Config::kChunkPairs>;
  using Rings = TwoRings<kStages, kStages, kConsumers>;

  struct SharedMemory {
    Tile<D> q[kConsumers];  // also where the output leaves from
    TilePair<D> k[kStages];
    Tile<D> v[kStages][2];
    Rings rings;
    KeySchedule schedule;
    ResidentTiles<kConsumers> resident;
  };

  VSA_DEVICE static void init_barriers(SharedMemory& s) {
    s.rings.init();
    s.schedule.init(kProducers);
    s.resident.init();
    for (int w = 0; w < kConsumers; ++w) label(s.q[w], "q", w);
    for (int i = 0; i < kStages; ++i) label(s.k[i], "k", i);
    for (int i = 0; i < 2 * kStages; ++i) label(s.v[i / 2][i % 2], "v", i);
  }

  VSA_DEVICE static void prologue(const Params& p, SharedMemory& s, int thread, int threads) {
    for (int w = 0; w < kConsumers; ++w)
      zero_tail(s.q[w], p.queries.grid.tile.volume(), thread, threads);
    const int rows = p.keys.grid.tile.volume();
    for (int i = 0; i < kStages; ++i) zero_tail(s.k[i], rows, thread, threads);
    for (int i = 0; i < 2 * kStages; ++i) zero_tail(s.v[i / 2][i % 2], rows, thread, threads);
    fence_async_proxy();
  }

  VSA_DEVICE static void schedule(const Params& p, SharedMemory& s) {
    PairScheduler<Config::kScheduleWords, Config::kChunkPairs, kStages, PaddableSequence> scheduler(
        s.schedule, p.queries, p.keys, p.k, p.v);
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
      s_.schedule.for_each_load([&](int n, int i) {
        const TileLoad pair[2] = {s_.schedule.tile_load(n, 2 * i),
                                  s_.schedule.tile_load(n, 2 * i + 1)};
        Mbarrier& full = s_.rings.acquire_first(number_, pair[0].flags(), bytes(pair));
        auto& to = s_.k[Rings::first_stage(number_++)];
        VSA_UNROLL
        for (int half = 0; half < 2; ++half)
          s_.schedule.load(n, pair[half].place(p_.keys), to, half, p_.k,
                           &KeySchedule::Origins::first, full);
      });
    }
    VSA_DEVICE void run_values() {
      prefetch_map(p_.v.video.map);
      s_.schedule.for_each_load([&](int n, int i) {
        const TileLoad pair[2] = {s_.schedule.tile_load(n, 2 * i),
                                  s_.schedule.tile_load(n, 2 * i + 1)};
        Mbarrier& full = s_.rings.acquire_second(number_, pair[0].flags(), bytes(pair));
        auto& to = s_.v[Rings::second_stage(number_++)];
        VSA_UNROLL
        for (int half = 0; half < 2; ++half)
          s_.schedule.load(n, pair[half].place(p_.keys), to[half], p_.v,
                           &KeySchedule::Origins::second, full);
      });
    }

   private:
    VSA_DEVICE int bytes(const TileLoad (&pair)[2]) const {
      const int rows =
          p_.keys.box_rows(pair[0].place(p_.keys)) + p_.keys.box_rows(pair[1].place(p_.keys));
      return rows * D * kElementBytes;
    }

    const Params& p_;
    SharedMemory& s_;
    int number_ = 0;  // of the next pair
  };

  class Consumer {
   public:
    VSA_DEVICE Consumer(const Params& p, SharedMemory& s, int w)
        : p_(p), s_(s), w_(w), steps_(s.schedule, s.rings, w) {}

    VSA_DEVICE void run() {
      Assignment work = s_.resident.wait(w_, 0), done = {0, 0, Assignment::kIdle};
      for (int round = 1; work.tile != Assignment::kFinished; ++round) {
        if (work.tile >= 0) read_tile(q_, s_.q[w_]);
        PairStep first = steps_.first();
        if (done.tile >= 0) {
          named_sync(consumer_barrier(w_), kWarpgroupThreads);  // all have read their queries
          finish(done);
        }
        // The first scores run while the output before leaves through the place of the queries.
        if (first.is(ConsumerStep::kCompute)) {
          start_scores(first);
          if (done.tile >= 0) send(p_.out, done);
          wgmma_wait<0>(scores_);
        } else if (done.tile >= 0) {
          send(p_.out, done);
        }
        s_.resident.release(w_);
        mainloop(first);
        done = work;
        work = s_.resident.wait(w_, round);
      }
      if (done.tile >= 0) {
        finish(done);
        send(p_.out, done);
      }
      if (elect_one()) bulk_wait<0>();
    }

   private:
    VSA_DEVICE void start_scores(const PairStep& step) {
      s_.rings.wait_first(step);
      issue_scores(step);
    }

    // held: the first pair, whose scores are there
    VSA_DEVICE void mainloop(PairStep held) {
      fill(out_, 0.f);
      softmax_.reset();
      const auto wait = [&](const PairStep& step) { s_.rings.wait_first(step); };
      while (held.is(ConsumerStep::kCompute)) {
        s_.rings.release_first(held);
        measure(held);
        softmax_.rescale(out_);
        weigh();
        PairStep next = steps_.next_compute(steps_.take(), wait);
        while (next.is(ConsumerStep::kCompute)) {
          issue_scores(next);
          s_.rings.wait_second(held);
          wgmma_fence();
          add_output<0>(held);
          wgmma_commit();
          PairStep after = steps_.take();
          wgmma_wait<1>(scores_);
          s_.rings.release_first(next);
          mask(next);
          RowValues top[2];
          wgmma_fence();
          add_output_and_measure<1>(held, top);
          wgmma_commit();
          softmax_.measure_part<56, 8>(top, scores_);
          softmax_.raise(top, p_.scale);
          wgmma_wait<0>(out_);
          s_.rings.release_second(held);
          softmax_.rescale(out_);
          after = steps_.past_chunk_end(after);
          const bool there = s_.rings.has_first(after, after.is(ConsumerStep::kCompute));
          weigh();
          held = next;
          next = there ? after : steps_.next_compute(after, wait);
        }
        s_.rings.wait_second(held);
        issue_output(held);
        wgmma_wait<0>(out_);
        s_.rings.release_second(held);
        held = steps_.resume(next);
        if (held.is(ConsumerStep::kCompute)) {
          start_scores(held);
          wgmma_wait<0>(scores_);
        }
      }
      steps_.end_work_tile();
    }
    VSA_DEVICE void issue_scores(const PairStep& step) {
      mma_ABt<Element>(scores_, q_, s_.k[step.first().stage]);
      wgmma_commit();
    }
    VSA_DEVICE void issue_output(const PairStep& step) {
      mma_AB<Element>(out_, weights_, s_.v[step.second().stage]);
      wgmma_commit();
    }
    // out += weights V, 16 keys of the pair
    template <int Part>
    VSA_DEVICE void add_output(const PairStep& step) {
      const Tile<D>& values = s_.v[step.second().stage][Part / 4];
      wgmma<Element, true>(out_, weights_, Part, rows_descriptor(values.address(), Part % 4), true);
    }
    // The other parts, with maxima of new scores between them: a consumer stays at each product
    // until the one before has been taken.
    template <int Part>
    VSA_DEVICE void add_output_and_measure(const PairStep& held, RowValues (&top)[2]) {
      softmax_.measure_part<8 * (Part - 1), 8>(top, scores_);
      add_output<Part>(held);
      if constexpr (Part < 7) add_output_and_measure<Part + 1>(held, top);
    }
    VSA_DEVICE void mask(const PairStep& step) {
      if (step.masked()) fill_columns(scores_, steps_.rows(step).of_tiles, -INFINITY);
    }
    VSA_DEVICE void measure(const PairStep& step) {
      mask(step);
      softmax_.measure(scores_, p_.scale);
    }
    VSA_DEVICE void weigh() { softmax_.weigh_into<Element>(weights_, scores_, p_.scale); }

    // The output into the place of q, and its log-sum-exp.
    VSA_DEVICE void finish(const Assignment& work) {
      RowValues lse;
      softmax_.finish(out_, lse, p_.scale);
      const TilePlace at = p_.queries.place(work.tile);
      const uint64_t rows = p_.queries.rows(at, work.batch);
      if (at.stores_padding())
        for_each(out_, [=](float& x, int row, int) { x = rows >> row & 1 ? x : 0.f; });
      Epilogue::template finish<Element>(out_, p_, work, at, rows, [&](const TokenTensor& to) {
        write(at);
        send(to, work);
        named_sync(consumer_barrier(w_), kWarpgroupThreads);  // the tile is free again
      });
      write(at);
      const int64_t head = int64_t{work.batch} * p_.heads + work.head;
      float* to = p_.lse + head * p_.queries.grid.num_tokens();
      for_each_row(lse, [&](float x, int row) {
        const int token = p_.queries.token(at, row);
        if (token >= 0) to[token] = rows >> row & 1 ? x : -INFINITY;
      });
    }
    VSA_DEVICE void write(const TilePlace& at) {
      Operand<D> rounded;
      round_to<Element>(rounded, out_);
      write_tile(s_.q[w_], rounded, at.rows_before());
      fence_async_proxy();
    }
    VSA_DEVICE void send(const TokenTensor& to, const Assignment& work) {
      named_sync(consumer_barrier(w_), kWarpgroupThreads);
      if (elect_one()) {
        const TileBox box = store_box_of(to, p_.queries.place(work.tile), work.head, work.batch);
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
    Operand<D> q_;
    Fragment<128> scores_;
    Operand<128> weights_;
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

}  // namespace vsa
