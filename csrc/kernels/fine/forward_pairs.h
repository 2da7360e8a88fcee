// SPDX-License-Identifier: Apache-2.0
// Prototype: the forward by pairs of key tiles, two in a softmax step.
#pragma once
#include "kernels/fine/forward.h"

namespace vsa {

// What is in flight behind a consumer's softmax.
enum class PairOrder { Alone, Split, Behind };

template <class Element_, int D_, PairOrder Order_, bool QueriesInRegisters = false>
struct PairConfig {
  static constexpr bool kQueriesInRegisters = QueriesInRegisters;
  using Element = Element_;
  static constexpr int D = D_;
  static constexpr PairOrder kOrder = Order_;
  static constexpr int kConsumers = Order_ == PairOrder::Behind ? 2 : 3;
  using Rings = std::conditional_t<
      kConsumers == 2, TwoRings<5, 6, kConsumers>,
      std::conditional_t<D == 128, TwoRings<5, 5, kConsumers>, OneRing<11, kConsumers>>>;
  static constexpr int kScheduleWords = 8, kChunkLoads = D == 128 ? 96 : 64;
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : D == 128 ? 32 : 56;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : D == 128 ? 160 : 152;
};

template <class Config, class Epilogue = PlainOutput>
struct FineForwardPairs : FineForward<Config, Epilogue> {
  using Base = FineForward<Config, Epilogue>;
  using Element = typename Config::Element;
  using Params = typename Epilogue::Params;
  using SharedMemory = typename Base::SharedMemory;
  using KeySchedule = typename Base::KeySchedule;
  using Rings = typename Config::Rings;
  static constexpr int D = Config::D;
  static constexpr int kConsumers = Config::kConsumers;
  // Two tiles are held together, so the second must not need the stage of the first.
  static constexpr int kHold = Rings::kFirst < Rings::kSecond ? Rings::kFirst : Rings::kSecond;

  VSA_DEVICE static void schedule(const Params& p, SharedMemory& s) {
    TileScheduler<kConsumers, Config::kScheduleWords, Config::kChunkLoads, Rings::kFirst,
                  Rings::kSecond, PaddableSequence, kHold>
        scheduler(s.schedule, p.queries, p.keys, p.k, p.v);
    scheduler.add_query_tiles(p, p.tile_counter);
    scheduler.finish();
  }

  class Consumer {
   public:
    VSA_DEVICE Consumer(const Params& p, SharedMemory& s, int w)
        : p_(p), s_(s), w_(w), steps_(s.schedule, s.rings, w) {}

    VSA_DEVICE void run() {
      s_.resident.for_each_work_tile(w_, [&](const Assignment& work) {
        mainloop();
        if (work.tile >= 0) store(work);
      });
      if (elect_one()) bulk_wait<0>();
    }

   private:
    // Two tiles that are worked on together; a single one stands in both places, once masked.
    struct Pair {
      ConsumerStep a, b;
      bool both;
    };

    // The pair that begins with `a`, whose keys are waited for; `after`: the step that follows it.
    VSA_DEVICE Pair pair_from(const ConsumerStep& a, ConsumerStep& after) {
      const ConsumerStep next = steps_.past_chunk_end(steps_.take());
      const bool both = next.is(ConsumerStep::kCompute);
      Pair pair = {a, both ? next : a, both};
      if (!both) pair.b.rows = 0;
      after = next;
      return pair;
    }

    VSA_DEVICE void mainloop() {
      fill(out_, 0.f);
      softmax_.reset();
      if constexpr (Config::kQueriesInRegisters) read_tile(q_, s_.q[w_]);
      if constexpr (Config::kOrder == PairOrder::Behind)
        behind();
      else
        alone();
      steps_.end_work_tile();
    }

    VSA_DEVICE void alone() {
      ConsumerStep a = steps_.resume(steps_.first());
      while (a.is(ConsumerStep::kCompute)) {
        wait_keys(a);
        issue_scores(first_, a);
        ConsumerStep after;
        const Pair now = pair_from(a, after);
        wait_keys(now.b);
        issue_scores(second_, now.b);
        wgmma_wait<0>(first_, second_);
        release_keys(now);
        mask_columns(first_, now.a.rows);
        mask_columns(second_, now.b.rows);
        softmax_.raise(p_.scale, first_, second_);
        constexpr bool kSplit = Config::kOrder == PairOrder::Split;
        if constexpr (kSplit) wait_values(now);
        softmax_.rescale(out_);
        softmax_.template weigh_into<Element>(first_weights_, first_, p_.scale);
        if constexpr (kSplit) issue_output(first_weights_, now.a);
        if constexpr (!kSplit) wait_second(now.a);
        softmax_.template weigh_into<Element>(second_weights_, second_, p_.scale);
        if constexpr (!kSplit) {
          wait_second(now.b);
          issue_output(first_weights_, now.a);
        }
        issue_output(second_weights_, now.b);
        if (now.both) after = steps_.take();
        after = steps_.past_chunk_end(after);
        wgmma_wait<0>(out_);
        release_values(now);
        a = steps_.resume(steps_.next_compute(after));
      }
    }

    VSA_DEVICE void behind() {
      ConsumerStep a = steps_.resume(steps_.first());
      while (a.is(ConsumerStep::kCompute)) {
        ConsumerStep after;
        wait_keys(a);
        Pair held = pair_from(a, after);
        wait_keys(held.b);
        issue_pair(held);
        wgmma_wait<0>(first_, second_);
        release_keys(held);
        weigh(held);
        softmax_.rescale(out_);
        round();
        wait_values(held);
        if (held.both) after = steps_.past_chunk_end(steps_.take());
        while (after.is(ConsumerStep::kCompute)) {
          wait_keys(after);
          const Pair next = pair_from(after, after);
          wait_keys(next.b);
          issue_pair(next);
          issue_output(first_weights_, held.a);
          issue_output(second_weights_, held.b);
          wgmma_wait<2>(first_, second_);
          release_keys(next);
          weigh(next);
          if (next.both) after = steps_.take();
          after = steps_.past_chunk_end(after);
          wgmma_wait<0>(out_);
          release_values(held);
          softmax_.rescale(out_);
          round();
          held = next;
          wait_values(held);
        }
        issue_output(first_weights_, held.a);
        issue_output(second_weights_, held.b);
        wgmma_wait<0>(out_);
        release_values(held);
        a = steps_.resume(steps_.next_compute(after));
      }
    }

    VSA_DEVICE void issue_pair(const Pair& pair) {
      issue_scores(first_, pair.a);
      issue_scores(second_, pair.b);
    }
    VSA_DEVICE void release_keys(const Pair& pair) {
      release_first(pair.a);
      if (pair.both) release_first(pair.b);
    }
    VSA_DEVICE void wait_values(const Pair& pair) {
      wait_second(pair.a);
      wait_second(pair.b);
    }
    VSA_DEVICE void release_values(const Pair& pair) {
      s_.rings.release_second(pair.a);
      if (pair.both) s_.rings.release_second(pair.b);
    }
    VSA_DEVICE void weigh(const Pair& pair) {
      mask_columns(first_, pair.a.rows);
      mask_columns(second_, pair.b.rows);
      softmax_.weigh_together(p_.scale, first_, second_);
    }
    VSA_DEVICE void round() {
      round_to<Element>(first_weights_, first_);
      round_to<Element>(second_weights_, second_);
    }

    VSA_DEVICE void wait_keys(const ConsumerStep& step) {
      if constexpr (Rings::kTogether)
        s_.rings.wait_both(step);
      else
        s_.rings.wait_first(step);
    }
    VSA_DEVICE void wait_second(const ConsumerStep& at) {
      if constexpr (!Rings::kTogether) s_.rings.wait_second(at);
    }
    VSA_DEVICE void release_first(const ConsumerStep& at) {
      if constexpr (!Rings::kTogether) s_.rings.release_first(at);
    }
    VSA_DEVICE void issue_scores(Fragment<64>& scores, const ConsumerStep& step) {
      if constexpr (Config::kQueriesInRegisters)
        mma_ABt<Element>(scores, q_, s_.k[step.first().stage]);
      else
        mma_ABt<Element>(scores, s_.q[w_], s_.k[step.first().stage]);
      wgmma_commit();
    }
    VSA_DEVICE void issue_output(const Operand<64>& weights, const ConsumerStep& step) {
      mma_AB<Element>(out_, weights, s_.v[step.second().stage]);
      wgmma_commit();
    }

    VSA_DEVICE void store(const Assignment& work) {
      RowValues lse;
      softmax_.finish(out_, lse, p_.scale);
      const TilePlace at = p_.queries.place(work.tile);
      const uint64_t rows = p_.queries.rows(at, work.batch);
      if (at.stores_padding())
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
      write_tile(s_.q[w_], rounded, at.rows_before());
      fence_async_proxy();
      named_sync(consumer_barrier(w_), kWarpgroupThreads);
      if (elect_one()) {
        const TileBox box = store_box_of(to, at, work.head, work.batch);
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
    Fragment<64> first_, second_;
    Operand<64> first_weights_, second_weights_;
    Fragment<D> out_;
  };

  VSA_DEVICE static void consume(const Params& p, SharedMemory& s, int w) {
    Consumer(p, s, w).run();
  }
};

}  // namespace vsa
