// SPDX-License-Identifier: Apache-2.0
// The tail, backward, second pass: what it adds to the gradient of the queries.
//
//   P = 2^(s - LSE)      dS = P (dO mean v^T - delta)      dQ += scale dS mean k
//
// The forward kernel's walk, with dO beside Q. LSE and delta are those of the whole softmax, which
// the pass over tokens has left (kernels/fine/backward_rows.h). What the fine stage has stored of
// dQ comes along, and the sum goes back to its place.
//
//     scores(next)  dP(next)    dQ += dS mean k(held)     in flight together
//     wait for the first two -> weights, dS
//     wait for chunk after next
//     wait for dQ -> release held -> round dS
#pragma once
#include "kernels/fine/softmax.h"
#include "kernels/schedule/resident_tiles.h"
#include "kernels/tail/chunks.h"

namespace vsa {

template <class Element_, int D_>
struct TailBackwardQueriesConfig {
  using Element = Element_;
  static constexpr int D = D_;
  // Consumers and registers are those of the fine stage's kernel.
  static constexpr int kConsumers = D == 128 ? 2 : 3;
  static constexpr int kStages = D == 128 ? 3 : 7;
  static constexpr bool kQueriesInRegisters = D == 128;
  static constexpr int kProducerRegisters = kConsumers == 2 ? 24 : 56;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 240 : 152;
};

template <class Config>
struct TailBackwardQueries {
  using Element = typename Config::Element;
  using Params = TailBackwardParams;
  static constexpr int D = Config::D;
  static constexpr int kConsumers = Config::kConsumers;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads;
  enum Producers { kQueryProducer, kMeanProducer, kProducers };
  static constexpr int kProducerRegisters = Config::kProducerRegisters;
  static constexpr int kConsumerRegisters = Config::kConsumerRegisters;

  using Work = TailWork<kConsumers>;

  struct SharedMemory {
    Tile<D> q[kConsumers];  // also where the gradient leaves from
    Tile<D> grad_out[kConsumers];
    TailRing<D, Config::kStages, kConsumers> ring;
    ResidentTiles<kConsumers> resident;
  };

  VSA_DEVICE static void init_barriers(SharedMemory& s) {
    s.ring.init();
    s.resident.init();
    for (int w = 0; w < kConsumers; ++w) {
      label(s.q[w], "q", w);
      label(s.grad_out[w], "grad_out", w);
    }
  }

  VSA_DEVICE static void prologue(const Params& p, SharedMemory& s, int thread, int threads) {
    const int rows = p.queries.grid.tile.volume();
    for (int w = 0; w < kConsumers; ++w) {
      zero_tail(s.q[w], rows, thread, threads);
      zero_tail(s.grad_out[w], rows, thread, threads);
    }
    fence_async_proxy();
  }

  VSA_HD static Work work_of(const Params& p) { return Work(p.queries, p.batch, p.heads, false); }

  VSA_DEVICE static void load_queries(const Params& p, SharedMemory& s) {
    prefetch_map(p.q.video.map);
    prefetch_map(p.grad_out.video.map);
    const Work work = work_of(p);
    s.resident.load_work_tiles(
        work, p.queries, [&](int w, const WorkTile& work, const TilePlace& at, Mbarrier& full) {
          const TileBox q = box_of(p.q, at, work.head, work.batch);
          const TileBox grad_out = box_of(p.grad_out, at, work.head, work.batch);
          full.arrive_expect_tx(2 * p.queries.box_rows(at) * D * kElementBytes);
          load_tile(s.q[w], q.map, q.at, full, CacheHint::EvictFirst);
          load_tile(s.grad_out[w], grad_out.map, grad_out.at, full, CacheHint::EvictFirst);
        });
  }

  VSA_DEVICE static void load_means(const Params& p, SharedMemory& s) {
    s.ring.load_all(p.tail, work_of(p), p.heads / p.kv_heads);
  }

  class Consumer {
   public:
    VSA_DEVICE Consumer(const Params& p, SharedMemory& s, int w) : p_(p), s_(s), w_(w) {}

    VSA_DEVICE void run() {
      s_.resident.for_each_work_tile(w_, [&](const Assignment& work) {
        if (work.tile >= 0)
          work_on(work);
        else
          pass();
      });
      if (elect_one()) bulk_wait<0>();
    }

   private:
    // The chunks go by a consumer without a tile.
    VSA_DEVICE void pass() {
      for (const int end = held_ + p_.tail.chunks(); held_ < end; ++held_) {
        s_.ring.wait(held_);
        s_.ring.release(held_);
      }
    }

    VSA_DEVICE void work_on(const Assignment& work) {
      const RowStats& stats = p_.stats(work.batch, work.head, work.tile);
      set_rows(lse_, [&](int row) { return load_global(stats.lse + row); });
      set_rows(delta_, [&](int row) { return load_global(stats.delta + row); });
      if constexpr (Config::kQueriesInRegisters) {
        read_tile(q_, s_.q[w_]);
        read_tile(grad_out_, s_.grad_out[w_]);
      }
      mainloop(work);
      store(s_.resident.assignment[w_].get());  // read anew: kept, it would not fit into registers
    }

    VSA_DEVICE void mainloop(const Assignment& work) {
      fill(grad_q_, 0.f);
      const int chunks = p_.tail.chunks();
      const uint32_t* row = p_.bitmap_row(work.batch, work.head, work.tile);
      const int end = held_ + chunks;
      int ahead = held_;  // chunks before it have been waited for
      wait_to(ahead, held_ + 1);
      issue_scores(held_);
      uint64_t left_out = TailChunk::left_out(p_.tail.tiles, row, 0);
      wgmma_wait<0>(scores_, grad_scores_);
      differentiate(held_, left_out);
      round_to<Element>(rounded_, grad_scores_);
      wait_to(ahead, held_ + 2 < end ? held_ + 2 : end);
      for (int chunk = 1; chunk < chunks; ++chunk, ++held_) {
        issue_scores(held_ + 1);
        issue_gradient(held_);
        left_out = TailChunk::left_out(p_.tail.tiles, row, chunk);
        wgmma_wait<1>(scores_, grad_scores_);
        differentiate(held_ + 1, left_out);
        wait_to(ahead, held_ + 3 < end ? held_ + 3 : end);
        wgmma_wait<0>(grad_q_);
        s_.ring.release(held_);
        round_to<Element>(rounded_, grad_scores_);
      }
      issue_gradient(held_);
      wgmma_wait<0>(grad_q_);
      s_.ring.release(held_++);
    }

    // A loop, though it takes one round or none: ptxas keeps softmax in front of a loop.
    VSA_DEVICE void wait_to(int& ahead, int end) {
      for (; ahead < end; ++ahead) s_.ring.wait(ahead);
    }
    VSA_DEVICE void issue_scores(int n) {
      if constexpr (Config::kQueriesInRegisters) {
        mma_ABt<Element>(scores_, q_, s_.ring.k_low(n));
        mma_ABt<Element>(scores_, q_, s_.ring.k(n), true);
        mma_ABt<Element>(grad_scores_, grad_out_, s_.ring.v(n));
      } else {
        mma_ABt<Element>(scores_, s_.q[w_], s_.ring.k_low(n));
        mma_ABt<Element>(scores_, s_.q[w_], s_.ring.k(n), true);
        mma_ABt<Element>(grad_scores_, s_.grad_out[w_], s_.ring.v(n));
      }
      wgmma_commit();
    }
    VSA_DEVICE void issue_gradient(int n) {
      mma_AB<Element>(grad_q_, rounded_, s_.ring.k(n));
      wgmma_commit();
    }
    // Scores become weights, and the gradients of weights become gradients of scores.
    VSA_DEVICE void differentiate(int n, uint64_t left_out) {
      const float scale = p_.scale_log2;
      map_columns(scores_, s_.ring.bias(n),
                  [=](float x, float bias) { return fma(x, scale, bias); });
      mask_columns(scores_, left_out);
      map_rows(scores_, lse_, [](float x, float lse) { return exp2_approx(x - lse); });
      map_rows(grad_scores_, delta_, [](float x, float delta) { return x - delta; });
      zip(grad_scores_, scores_, [](float x, float weight) { return x * weight; });
    }

    VSA_DEVICE void store(const Assignment& work) {
      const TilePlace at = p_.queries.place(work.tile);
      add_fine(work, at);
      Operand<D> rounded;
      round_to<Element>(rounded, grad_q_);
      write_tile(s_.q[w_], rounded);
      fence_async_proxy();
      named_sync(consumer_barrier(w_), kWarpgroupThreads);
      if (elect_one()) {
        const TileBox box = box_of(p_.grad_q, at, work.head, work.batch);
        store_tile(box.map, box.at, s_.q[w_]);
        bulk_commit();
        bulk_wait_read<0>();
      }
    }

    // dQ of the tail, and what the fine stage has stored of it. Nobody else touches that meanwhile.
    VSA_DEVICE void add_fine(const Assignment& work, const TilePlace& at) {
      const float scale = p_.scale;
      VSA_EACH_LANE(t) {
        auto& x = lane(grad_q_, t);
        VSA_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int token = p_.queries.token(at, accumulator_row(t, 2 * half));
          if (token < 0) continue;
          const uint16_t* row = p_.grad_q_rows.row(work.batch, token, work.head);
          VSA_UNROLL
          for (int i = 2 * half; i < D / 2; i += 4) {
            const uint32_t pair =
                *reinterpret_cast<const uint32_t*>(row + accumulator_column(t, i));
            x[i] = fma(x[i], scale, widen_low<Element>(pair));
            x[i + 1] = fma(x[i + 1], scale, widen_high<Element>(pair));
          }
        }
      }
    }

    const Params& p_;
    SharedMemory& s_;
    const int w_;
    int held_ = 0;  // of chunks, counted over all work tiles
    RowValues lse_, delta_;
    Fragment<64> scores_, grad_scores_;  // [queries, means]
    Operand<D> q_, grad_out_;
    Operand<64> rounded_;
    Fragment<D> grad_q_;
  };

  VSA_DEVICE static void produce(const Params& p, SharedMemory& s, int which) {
    if (!elect_lane()) return;
    which == kQueryProducer ? load_queries(p, s) : load_means(p, s);
  }
  VSA_DEVICE static void consume(const Params& p, SharedMemory& s, int w) {
    Consumer(p, s, w).run();
  }
};

}  // namespace vsa
