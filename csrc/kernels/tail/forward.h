// SPDX-License-Identifier: Apache-2.0
// The tail, forward: the fine stage's output and log-sum-exp become those of the whole softmax.
//
//   out, lse  ->  (2^lse out + sum_j 2^s_j mean v_j) / 2^lse',   lse' = log2(2^lse + sum_j 2^s_j)
//
// The online softmax goes on where the fine stage has ended, as if all that it saw had been one
// key. Each consumer of a block has one query tile, and chunks of means pass by all of them
// (chunks.h). As in the fine stage, softmax runs while the tensor cores work:
//
//     scores(next)  out += weights mean v(held)     in flight together
//     wait for scores -> softmax
//     wait for chunk after next
//     wait for out -> release held -> rescale out, round weights
//
// With gates the end is that of the fine stage's kernel (kernels/fine/epilogue.h), and tiles of
// text, which have no tail, come here for it alone.
#pragma once
#include "kernels/fine/epilogue.h"
#include "kernels/fine/softmax.h"
#include "kernels/schedule/resident_tiles.h"
#include "kernels/tail/chunks.h"

namespace vsa {

template <class Element_, int D_>
struct TailForwardConfig {
  using Element = Element_;
  static constexpr int D = D_;
  // Two tiles of each consumer and three of each stage: three consumers would leave two stages.
  static constexpr int kConsumers = D == 128 ? 2 : 4;
  static constexpr int kStages = D == 128 ? 3 : 6;
  static constexpr int kProducerRegisters = D == 128 ? 24 : 32;
  static constexpr int kConsumerRegisters = D == 128 ? 240 : 112;
};

template <class Config, class Epilogue = PlainOutput>
struct TailForward {
  using Element = typename Config::Element;
  using Params = TailForwardParams<typename Epilogue::Params>;
  static constexpr int D = Config::D;
  static constexpr int kConsumers = Config::kConsumers;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads;
  enum Producers { kQueryProducer, kMeanProducer, kProducers };
  static constexpr int kProducerRegisters = Config::kProducerRegisters;
  static constexpr int kConsumerRegisters = Config::kConsumerRegisters;

  using Work = TailWork<kConsumers>;

  struct SharedMemory {
    Tile<D> q[kConsumers];  // also where the output leaves from
    Tile<D> out[kConsumers];
    TailRing<D, Config::kStages, kConsumers> ring;
    ResidentTiles<kConsumers> resident;
  };

  VSA_DEVICE static void init_barriers(SharedMemory& s) {
    s.ring.init();
    s.resident.init();
    for (int w = 0; w < kConsumers; ++w) {
      label(s.q[w], "q", w);
      label(s.out[w], "out", w);
    }
  }

  VSA_DEVICE static void prologue(const Params& p, SharedMemory& s, int thread, int threads) {
    for (int w = 0; w < kConsumers; ++w) {
      zero_tail(s.q[w], p.queries.grid.tile.volume(), thread, threads);
      zero_tail(s.out[w], p.queries.grid.tile.volume(), thread, threads);
    }
    fence_async_proxy();
  }

  VSA_HD static Work work_of(const Params& p) { return Work(p.queries, p.batch, p.heads, p.text); }

  VSA_DEVICE static void load_queries(const Params& p, SharedMemory& s) {
    prefetch_map(p.q.video.map);
    prefetch_map(p.out.video.map);
    const Work work = work_of(p);
    s.resident.load_work_tiles(
        work, p.queries, [&](int w, const WorkTile& work, const TilePlace& at, Mbarrier& full) {
          const TileBox q = box_of(p.q, at, work.head, work.batch);
          const TileBox out = box_of(p.out, at, work.head, work.batch);
          full.arrive_expect_tx(2 * p.queries.box_rows(at) * D * kElementBytes);
          load_tile(s.q[w], q.map, q.at, full, CacheHint::EvictFirst);
          load_tile(s.out[w], out.map, out.at, full, CacheHint::EvictFirst);
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
    VSA_DEVICE void work_on(const Assignment& work) {
      resume(work, p_.queries.place(work.tile));
      bool any = false;  // tile that was not chosen
      if (p_.queries.is_text(work.tile))
        pass();
      else
        any = mainloop(work);
      store(s_.resident.assignment[w_].get(),
            any);  // read anew: kept, it would not fit into registers
    }

    // The chunks go by.
    VSA_DEVICE void pass() {
      for (const int end = held_ + p_.tail.chunks(); held_ < end; ++held_) {
        s_.ring.wait(held_);
        s_.ring.release(held_);
      }
    }

    // Softmax and output as the fine stage has left them.
    VSA_DEVICE void resume(const Assignment& work, const TilePlace& at) {
      Operand<D> rounded;
      read_tile(rounded, s_.out[w_]);
      VSA_EACH_LANE(t) {
        const auto& pairs = lane(rounded, t);
        auto& x = lane(out_, t);
        VSA_UNROLL
        for (int r = 0; r < D / 4; ++r) {
          x[2 * r] = widen_low<Element>(pairs[r]);
          x[2 * r + 1] = widen_high<Element>(pairs[r]);
        }
      }
      const float* from = lse_of(work);
      RowValues lse;
      set_rows(lse, [&](int row) {
        const int token = p_.queries.token(at, row);
        return token < 0 ? 0.f : from[token] * Softmax::kLog2e;
      });
      softmax_.resume(lse);
    }

    // Whether there was a tail at all.
    VSA_DEVICE bool mainloop(const Assignment& work) {
      const int chunks = p_.tail.chunks(), words = bitmap::words(p_.tail.tiles);
      const uint32_t* row = bitmap_of(p_.bitmap, work.batch, p_.heads, work.head,
                                      p_.queries.grid.num_tiles(), words) +
                            work.tile * words;
      const int end = held_ + chunks;
      int ahead = held_;  // chunks before it have been waited for
      wait_to(ahead, held_ + 1);
      issue_scores(held_);
      uint64_t left_out = TailChunk::left_out(p_.tail.tiles, row, 0);
      bool any = left_out != 0;
      wgmma_wait<0>(scores_);
      weigh(held_, left_out);
      softmax_.rescale(out_);
      round_to<Element>(weights_, scores_);
      wait_to(ahead, held_ + 2 < end ? held_ + 2 : end);
      for (int chunk = 1; chunk < chunks; ++chunk, ++held_) {
        issue_scores(held_ + 1);
        issue_output(held_);
        left_out = TailChunk::left_out(p_.tail.tiles, row, chunk);
        any |= left_out != 0;
        wgmma_wait<1>(scores_);
        weigh(held_ + 1, left_out);
        wait_to(ahead, held_ + 3 < end ? held_ + 3 : end);
        wgmma_wait<0>(out_);
        s_.ring.release(held_);
        softmax_.rescale(out_);
        round_to<Element>(weights_, scores_);
      }
      issue_output(held_);
      wgmma_wait<0>(out_);
      s_.ring.release(held_++);
      return any;
    }

    // A loop, though it takes one round or none: ptxas keeps softmax in front of a loop.
    VSA_DEVICE void wait_to(int& ahead, int end) {
      for (; ahead < end; ++ahead) s_.ring.wait(ahead);
    }
    VSA_DEVICE void issue_scores(int n) {
      mma_ABt<Element>(scores_, s_.q[w_], s_.ring.k_low(n));
      mma_ABt<Element>(scores_, s_.q[w_], s_.ring.k(n), true);
      wgmma_commit();
    }
    VSA_DEVICE void issue_output(int n) {
      mma_AB<Element>(out_, weights_, s_.ring.v(n));
      wgmma_commit();
    }
    VSA_DEVICE void weigh(int n, uint64_t left_out) {
      const float scale = p_.scale;
      map_columns(scores_, s_.ring.bias(n),
                  [=](float x, float bias) { return fma(x, scale, bias); });
      mask_columns(scores_, left_out);
      softmax_.weigh(scores_, 1.f);
    }

    VSA_DEVICE void store(const Assignment& work, bool any) {
      const TilePlace at = p_.queries.place(work.tile);
      RowValues lse;
      softmax_.finish(out_, lse, 1.f);
      if (any) {  // else the fine stage's stands, to the bit
        float* to = lse_of(work);
        for_each_row(lse, [&](float x, int row) {
          const int token = p_.queries.token(at, row);
          if (token >= 0) to[token] = x;
        });
      }
      const uint64_t rows = p_.queries.rows(at, work.batch);
      Epilogue::template finish<Element>(out_, p_, work, at, rows, [&](const TokenTensor& to) {
        write(to, at, work);
        named_sync(consumer_barrier(w_), kWarpgroupThreads);  // the tile is free again
      });
      write(p_.out, at, work);
    }

    VSA_DEVICE float* lse_of(const Assignment& work) const {
      const int64_t head = int64_t{work.batch} * p_.heads + work.head;
      return p_.lse + head * p_.queries.grid.num_tokens();
    }

    // The tile of the output through the place of q.
    VSA_DEVICE void write(const TokenTensor& to, const TilePlace& at, const Assignment& work) {
      Operand<D> rounded;
      round_to<Element>(rounded, out_);
      write_tile(s_.q[w_], rounded);
      fence_async_proxy();
      named_sync(consumer_barrier(w_), kWarpgroupThreads);
      if (elect_one()) {
        const TileBox box = box_of(to, at, work.head, work.batch);
        store_tile(box.map, box.at, s_.q[w_]);
        bulk_commit();
        bulk_wait_read<0>();
      }
    }

    const Params& p_;
    SharedMemory& s_;
    const int w_;
    int held_ = 0;  // of chunks, counted over all work tiles
    Softmax softmax_;
    Fragment<64> scores_;
    Operand<64> weights_;
    Fragment<D> out_;
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
