// SPDX-License-Identifier: Apache-2.0
// The tail, backward, first pass: the gradients of the means of keys and values.
//
//   P^T = 2^(s^T - LSE)                    dmean v = P^T dO
//   dS^T = P^T (mean v dO^T - delta)       dmean k = scale dS^T Q
//
// Each consumer of a block has a chunk of 64 means (chunks.h), and query tiles pass by, of all
// heads that share the key head. There are few chunks, so the query tiles of one are split among
// several blocks; each leaves its sums in a place of its own, and sum_parts.h adds them up, so that
// the bits are always the same. Scores are transposed, as in kernels/fine/backward_keys.h:
//
//     scores(next)    dmean k += dS^T Q of the tile held    in flight together
//     wait for scores -> weights
//     wait for dmean k -> release held
//     dP(next)        dmean v += P^T dO                     in flight together
//     wait for dP -> dS
//     wait for dmean v
//
//   barrier       arrives                                       waits
//   own_full      the producer of means, and its bytes          their consumer
//   own_empty     all threads of the consumer                   that producer
//   query_full    the producer of query tiles, and its bytes    the consumers
//   query_empty   all threads of both consumers                 that producer
#pragma once
#include "kernels/fine/softmax.h"
#include "kernels/tail/chunks.h"

namespace vsa {

template <class Element_, int D_>
struct TailBackwardMeansConfig {
  using Element = Element_;
  static constexpr int D = D_;
  static constexpr int kConsumers = 2;
  static constexpr int kStages = D == 128 ? 4 : 10;
  // As the fine stage's kernel has them.
  static constexpr int kProducerRegisters = D == 128 ? 24 : 40;
  static constexpr int kConsumerRegisters = D == 128 ? 240 : 232;
};

template <class Config>
struct TailBackwardMeans {
  using Element = typename Config::Element;
  using Params = TailBackwardParams;
  static constexpr int D = Config::D;
  static constexpr int kConsumers = Config::kConsumers;
  static constexpr int kStages = Config::kStages;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads;
  enum Producers { kMeanProducer, kQueryProducer, kProducers };
  static constexpr int kProducerRegisters = Config::kProducerRegisters;
  static constexpr int kConsumerRegisters = Config::kConsumerRegisters;

  struct SharedMemory {
    Tile<D> k[kConsumers];
    Tile<D> k_low[kConsumers];
    Tile<D> v[kConsumers];
    Tile<D> q[kStages];
    Tile<D> grad_out[kStages];
    alignas(kChunkBytes) RowStats stats[kStages];
    Mbarrier full[kStages];
    Mbarrier empty[kStages];
    Mbarrier own_full[kConsumers];
    Mbarrier own_empty[kConsumers];
  };

  VSA_DEVICE static void init_barriers(SharedMemory& s) {
    for (int w = 0; w < kConsumers; ++w) {
      s.own_full[w].init(1, "own_full", w);
      s.own_empty[w].init(kWarpgroupThreads, "own_empty", w);
      label(s.k[w], "mean_k", w);
      label(s.k_low[w], "mean_k_low", w);
      label(s.v[w], "mean_v", w);
    }
    for (int i = 0; i < kStages; ++i) {
      s.full[i].init(1, "query_full", i);
      s.empty[i].init(kConsumers * kWarpgroupThreads, "query_empty", i);
      label(s.q[i], "q", i);
      label(s.grad_out[i], "grad_out", i);
      label(s.stats[i], "stats", i);
    }
  }

  VSA_DEVICE static void prologue(const Params& p, SharedMemory& s, int thread, int threads) {
    for (int i = 0; i < kStages; ++i) {
      zero_tail(s.q[i], p.queries.grid.tile.volume(), thread, threads);
      zero_tail(s.grad_out[i], p.queries.grid.tile.volume(), thread, threads);
    }
    fence_async_proxy();
  }

  // Some chunks of a key head, one for each consumer, and a part of the query tiles. Block b of n
  // takes those of the numbers b, b + n, ...; the splits are outermost, so that blocks that run
  // together read the same query tiles.
  struct Group {
    int split, head, chunk;  // head: of the keys, counted over all batch elements; the first chunk
  };
  struct Work {
    int chunks, groups, heads, size;

    VSA_HD Work(const Params& p)
        : chunks(p.tail.chunks()),
          groups(ceil_div(chunks, kConsumers)),
          heads(p.batch * p.kv_heads),
          size(p.splits * heads * groups) {}

    // fn(round, group) for each of this block's
    template <class Fn>
    VSA_DEVICE void for_each(Fn fn) const {
      int round = 0;
      for (int index = block_index(); index < size; index += block_count()) {
        const int head = index / groups;
        fn(round++, Group{head / heads, head % heads, index % groups * kConsumers});
      }
    }
  };
  VSA_HD static Work work_of(const Params& p) { return Work(p); }

  // Query tiles of all heads that share a key head, one after the other: those of a split.
  struct Span {
    int begin, end;

    VSA_DEVICE Span(const Params& p, int split) {
      const int64_t all = int64_t{p.heads / p.kv_heads} * p.queries.grid.num_tiles();
      begin = static_cast<int>(all * split / p.splits);
      end = static_cast<int>(all * (split + 1) / p.splits);
    }
  };
  // Which tile of which head that is.
  VSA_DEVICE static Assignment query(const Params& p, int of_keys, int place) {
    const int tiles = p.queries.grid.num_tiles(), sharing = p.heads / p.kv_heads;
    return {of_keys / p.kv_heads, of_keys % p.kv_heads * sharing + place / tiles, place % tiles};
  }

  VSA_DEVICE static void load_means(const Params& p, SharedMemory& s) {
    prefetch_map(p.tail.k.map);
    prefetch_map(p.tail.k_low.map);
    prefetch_map(p.tail.v.map);
    const Work work(p);
    work.for_each([&](int round, const Group& group) {
      const int batch = group.head / p.kv_heads, head = group.head % p.kv_heads;
      for (int w = 0; w < kConsumers; ++w) {
        s.own_empty[w].wait(round - 1);
        Mbarrier& full = s.own_full[w];
        const int chunk = group.chunk + w;
        if (chunk >= work.chunks) {
          full.arrive_one();
          continue;
        }
        full.arrive_expect_tx(3 * static_cast<int>(sizeof(Tile<D>)));
        const auto load = [&](Tile<D>& to, const MappedTokens& from) {
          load_tile(to, from.map, TailChunk::box(from, chunk, head, batch), full);
        };
        load(s.k[w], p.tail.k);
        load(s.k_low[w], p.tail.k_low);
        load(s.v[w], p.tail.v);
      }
    });
  }

  VSA_DEVICE static void load_queries(const Params& p, SharedMemory& s) {
    prefetch_map(p.q.video.map);
    prefetch_map(p.grad_out.video.map);
    int n = 0;  // query tiles that have been loaded
    Work(p).for_each([&](int, const Group& group) {
      const Span span(p, group.split);
      for (int place = span.begin; place < span.end; ++place, ++n) {
        const Assignment of = query(p, group.head, place);
        const TilePlace at = p.queries.place(of.tile);
        const TileBox q = box_of(p.q, at, of.head, of.batch);
        const TileBox grad_out = box_of(p.grad_out, at, of.head, of.batch);
        const int stage = Ring<kStages>::stage(n);
        s.empty[stage].wait(Ring<kStages>::use(n) - 1);
        Mbarrier& full = s.full[stage];
        full.arrive_expect_tx(2 * p.queries.box_rows(at) * D * kElementBytes +
                              static_cast<int>(sizeof(RowStats)));
        load_tile(s.q[stage], q.map, q.at, full);
        load_tile(s.grad_out[stage], grad_out.map, grad_out.at, full);
        bulk_load(&s.stats[stage], &p.stats(of.batch, of.head, of.tile), sizeof(RowStats), full);
      }
    });
  }

  class Consumer {
   public:
    VSA_DEVICE Consumer(const Params& p, SharedMemory& s, int w) : p_(p), s_(s), w_(w) {}

    VSA_DEVICE void run() {
      const Work work(p_);
      work.for_each([&](int round, const Group& group) {
        s_.own_full[w_].wait(round);
        const Span span(p_, group.split);
        chunk_ = group.chunk + w_;
        fill(grad_k_, 0.f);
        fill(grad_v_, 0.f);
        if (chunk_ < work.chunks) {
          const float* bias = p_.tail.bias + chunk_ * kTileRows;
          set_rows(bias_, [&](int row) { return load_global(bias + row); });
          if (span.begin < span.end) mainloop(group.head, span);
        } else {
          pass(span);
        }
        s_.own_empty[w_].arrive_all();
        if (chunk_ < work.chunks) store(group);
      });
    }

   private:
    // Query tiles go by a consumer without a chunk.
    VSA_DEVICE void pass(const Span& span) {
      for (int place = span.begin; place < span.end; ++place, ++held_) {
        wait(held_);
        release(held_);
      }
    }

    VSA_DEVICE void mainloop(int of_keys, const Span& span) {
      wait(held_);
      issue_scores(held_);
      RowValues bias;
      mask(bias, of_keys, span.begin);
      wgmma_wait<0>(scores_);
      weigh(held_, bias);
      differentiate(held_);
      for (int place = span.begin + 1; place < span.end; ++place, ++held_) {
        wait(held_ + 1);
        issue_scores(held_ + 1);
        issue_grad_k(held_);
        mask(bias, of_keys, place);
        wgmma_wait<1>(scores_);
        weigh(held_ + 1, bias);
        wgmma_wait<0>(grad_k_);
        release(held_);
        differentiate(held_ + 1);
      }
      issue_grad_k(held_);
      wgmma_wait<0>(grad_k_);
      release(held_++);
    }

    VSA_DEVICE int stage(int n) const { return Ring<kStages>::stage(n); }
    VSA_DEVICE void wait(int n) { s_.full[stage(n)].wait(Ring<kStages>::use(n)); }
    VSA_DEVICE void release(int n) { s_.empty[stage(n)].arrive_all(); }

    VSA_DEVICE void issue_scores(int n) {
      mma_ABt<Element>(scores_, s_.k_low[no_hoist(w_)], s_.q[stage(n)]);
      mma_ABt<Element>(scores_, s_.k[no_hoist(w_)], s_.q[stage(n)], true);
      wgmma_commit();
    }
    VSA_DEVICE void issue_grad_k(int n) {
      mma_AB<Element>(grad_k_, rounded_, s_.q[stage(n)]);
      wgmma_commit();
    }

    // What the scores of each mean get for this query tile: -inf where its tile was chosen.
    VSA_DEVICE void mask(RowValues& bias, int of_keys, int place) {
      const Assignment of = query(p_, of_keys, place);
      const uint64_t left_out =
          TailChunk::left_out(p_.tail.tiles, p_.bitmap_row(of.batch, of.head, of.tile), chunk_);
      set_rows(bias, [&](int row) { return left_out >> row & 1 ? 0.f : -INFINITY; });
      zip(bias, bias_, [](float masked, float size) { return masked + size; });
    }
    VSA_DEVICE void weigh(int n, const RowValues& bias) {
      const float scale = p_.scale_log2;
      map_rows(scores_, bias, [=](float x, float b) { return fma(x, scale, b); });
      map_columns(scores_, s_.stats[stage(n)].lse,
                  [](float x, float lse) { return exp2_approx(x - lse); });
    }

    // Weights are operands of dmean v, and with them the gradients of weights become gradients of
    // scores, rounded. dmean v is complete afterwards.
    VSA_DEVICE void differentiate(int n) {
      round_to<Element>(rounded_, scores_);
      mma_ABt<Element>(grad_scores_, s_.v[no_hoist(w_)], s_.grad_out[stage(n)]);
      wgmma_commit();
      mma_AB<Element>(grad_v_, rounded_, s_.grad_out[stage(n)]);
      wgmma_commit();
      wgmma_wait<1>(grad_scores_);
      map_columns(grad_scores_, s_.stats[stage(n)].delta,
                  [](float x, float delta) { return x - delta; });
      zip(grad_scores_, scores_, [](float x, float weight) { return x * weight; });
      wgmma_wait<0>(grad_v_);
      round_to<Element>(rounded_, grad_scores_);
    }

    // This split's sums. The scale of scores is left to whoever adds them up.
    VSA_DEVICE void store(const Group& group) {
      const int64_t matrices = int64_t{p_.batch} * p_.kv_heads;
      const int64_t of_k = group.split * 2 * matrices + group.head;
      store(grad_k_, of_k);
      store(grad_v_, of_k + matrices);
    }
    VSA_DEVICE void store(const Fragment<D>& sums, int64_t matrix) {
      const int first = chunk_ * kTileRows, tiles = p_.tail.tiles;
      float* to = p_.parts + matrix * tiles * D;
      VSA_EACH_LANE(t) {
        const auto& x = lane(sums, t);
        VSA_UNROLL
        for (int i = 0; i < D / 2; i += 2) {
          const int row = first + accumulator_row(t, i);
          if (row < tiles)
            *reinterpret_cast<FloatPair*>(to + row * D + accumulator_column(t, i)) = {x[i],
                                                                                      x[i + 1]};
        }
      }
    }

    const Params& p_;
    SharedMemory& s_;
    const int w_;
    int chunk_;
    int held_ = 0;                       // of query tiles, counted over all work tiles
    RowValues bias_;                     // of this chunk
    Fragment<64> scores_, grad_scores_;  // [means, queries]
    Operand<64> rounded_;                // P^T, then dS^T
    Fragment<D> grad_k_, grad_v_;
  };

  VSA_DEVICE static void produce(const Params& p, SharedMemory& s, int which) {
    if (!elect_lane()) return;
    which == kMeanProducer ? load_means(p, s) : load_queries(p, s);
  }
  VSA_DEVICE static void consume(const Params& p, SharedMemory& s, int w) {
    Consumer(p, s, w).run();
  }
};

}  // namespace vsa
