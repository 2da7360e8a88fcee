// SPDX-License-Identifier: Apache-2.0
// Prototype: the forward by small blocks of one warpgroup, three to a multiprocessor, which start
// their copies themselves. Nothing is shared. No text.
#pragma once
#include "kernels/fine/forward.h"

namespace vsa {

template <class Element_, int D_, bool Overlap_ = true>
struct SmallConfig {
  using Element = Element_;
  static constexpr int D = D_;
  static constexpr bool kOverlap = Overlap_;
};

template <class Config, class Epilogue = PlainOutput>
struct FineForwardSmall {
  using Element = typename Config::Element;
  using Params = typename Epilogue::Params;
  static constexpr int D = Config::D;
  static constexpr int kConsumers = 1, kThreads = kWarpgroupThreads;
  static constexpr int kValueStages = 2, kMostTiles = 1200;

  struct SharedMemory {
    Tile<D> q, k, v[kValueStages];
    Shared<TileLoad> list[kMostTiles];
    Shared<int> counts[kWarpgroupThreads];
    Shared<int> next;
    Mbarrier q_full, k_full, k_empty, v_full[kValueStages], v_empty[kValueStages];
  };

  VSA_DEVICE static void label_tiles(SharedMemory& s) {
    label(s.q, "q", 0);
    label(s.k, "k", 0);
    for (int i = 0; i < kValueStages; ++i) label(s.v[i], "v", i);
  }
  VSA_DEVICE static void init_barriers(SharedMemory& s) {
    s.q_full.init(1, "q_full", 0);
    s.k_full.init(1, "k_full", 0);
    s.k_empty.init(kWarpgroupThreads, "k_empty", 0);
    for (int i = 0; i < kValueStages; ++i) {
      s.v_full[i].init(1, "v_full", i);
      s.v_empty[i].init(kWarpgroupThreads, "v_empty", i);
    }
  }
  VSA_DEVICE static void prologue(const Params& p, SharedMemory& s, int thread, int threads) {
    zero_tail(s.q, p.queries.grid.tile.volume(), thread, threads);
    zero_tail(s.k, p.keys.grid.tile.volume(), thread, threads);
    for (auto& v : s.v) zero_tail(v, p.keys.grid.tile.volume(), thread, threads);
    fence_async_proxy();
  }

  class Consumer {
   public:
    VSA_DEVICE Consumer(const Params& p, SharedMemory& s) : p_(p), s_(s) {}

    VSA_DEVICE void run() {
      const WorkList list(p_.queries, 1, p_.batch, p_.heads, p_.query_axes);
      for (int round = 0;; ++round) {
        if (elect_one()) s_.next.set(take_tile(p_.tile_counter));
        meet();
        const int index = s_.next.get();
        if (index >= list.size) break;
        const WorkTile work = list.work_tile(index, 1);
        const Assignment own = {work.batch, work.head,
                                tile_at(p_.queries, work.first_place, work.axis)};
        if (elect_one()) load_queries(own);
        find(own);
        keys_from_ = origin_of(p_.k, own.head / (p_.heads / p_.kv_heads), own.batch);
        values_from_ = origin_of(p_.v, own.head / (p_.heads / p_.kv_heads), own.batch);
        if (total_ > 0 && elect_one()) load_keys(0), load_values(0);
        s_.q_full.wait(round);
        mainloop(own.batch);
        store(own);
        begin_ += total_;
        meet();
      }
      if (elect_one()) bulk_wait<0>();
    }

   private:
    VSA_DEVICE void meet() { named_sync(consumer_barrier(0), kWarpgroupThreads); }

    // The tiles that the query tile selected.
    VSA_DEVICE void find(const Assignment& own) {
      const int words = bitmap::words(p_.keys.grid.num_tiles());
      const uint32_t* row = bitmap_of(p_.bitmap, own.batch, p_.heads, own.head,
                                      p_.queries.grid.num_tiles(), words) +
                            int64_t{own.tile} * words;
      VSA_EACH_LANE(t) {
        s_.counts[t].set(t < words ? popcount(load_global(row + t)) : 0);
      }
      meet();
      VSA_EACH_LANE(t) {
        int at = 0;
        for (int word = 0; word < t && word < words; ++word) at += s_.counts[word].get();
        if (t < words)
          for (uint32_t bits = load_global(row + t); bits != 0; bits &= bits - 1)
            s_.list[at++].set(TileLoad::of(p_.keys, t * kWordBits + bitmap::lowest(bits), 0));
      }
      total_ = 0;
      for (int word = 0; word < words; ++word) total_ += s_.counts[word].get();
      meet();
    }

    // By the elected thread.
    VSA_DEVICE void load_queries(const Assignment& own) {
      const TilePlace at = p_.queries.place(own.tile);
      const TileBox q = box_of(p_.q, at, own.head, own.batch);
      s_.q_full.arrive_expect_tx(p_.queries.box_rows(at) * D * kElementBytes);
      load_tile(s_.q, q.map, q.at, s_.q_full, CacheHint::EvictFirst);
    }
    VSA_DEVICE void load_keys(int i) {
      const int n = begin_ + i;
      const TilePlace at = s_.list[i].get().place(p_.keys);
      s_.k_empty.wait(n - 1);
      s_.k_full.arrive_expect_tx(p_.keys.box_rows(at) * D * kElementBytes);
      load_tile(s_.k, p_.k.video.map, keys_from_.box(at), s_.k_full, CacheHint::EvictLast);
    }
    VSA_DEVICE void load_values(int i) {
      const int n = begin_ + i, stage = n % kValueStages;
      const TilePlace at = s_.list[i].get().place(p_.keys);
      s_.v_empty[stage].wait(n / kValueStages - 1);
      s_.v_full[stage].arrive_expect_tx(p_.keys.box_rows(at) * D * kElementBytes);
      load_tile(s_.v[stage], p_.v.video.map, values_from_.box(at), s_.v_full[stage],
                CacheHint::EvictLast);
    }

    VSA_DEVICE void mainloop(int batch) {
      fill(out_, 0.f);
      softmax_.reset();
      if (total_ == 0) return;
      issue_scores(0);
      wgmma_wait<0>(scores_);
      after_scores(0);
      weigh(0, batch);
      softmax_.rescale(out_);
      round_to<Element>(weights_, scores_);
      for (int i = 1; i < total_; ++i) {
        if constexpr (Config::kOverlap) {
          issue_scores(i);
          issue_output(i - 1);
          wgmma_wait<1>(scores_);
          after_scores(i);
          weigh(i, batch);
          wait_values(i);
          wgmma_wait<0>(out_);
        } else {
          issue_output(i - 1);
          issue_scores(i);
          wgmma_wait<0>(out_, scores_);
          after_scores(i);
          weigh(i, batch);
        }
        release_values(i - 1);
        softmax_.rescale(out_);
        round_to<Element>(weights_, scores_);
      }
      issue_output(total_ - 1);
      wgmma_wait<0>(out_);
      s_.v_empty[(begin_ + total_ - 1) % kValueStages].arrive_all();
    }
    // The keys of the next tile come to the place of these.
    VSA_DEVICE void after_scores(int i) {
      s_.k_empty.arrive_all();
      if (i + 1 < total_ && elect_one()) {
        load_keys(i + 1);
        if (i == 0) load_values(1);
      }
    }
    VSA_DEVICE void release_values(int i) {
      s_.v_empty[(begin_ + i) % kValueStages].arrive_all();
      if (i + 2 < total_ && elect_one()) load_values(i + 2);
    }
    VSA_DEVICE void weigh(int i, int batch) {
      const TilePlace at = s_.list[i].get().place(p_.keys);
      mask_columns(scores_, p_.keys.rows(at, batch));
      softmax_.weigh(scores_, p_.scale);
    }
    VSA_DEVICE void wait_values(int i) {
      const int n = begin_ + i;
      s_.v_full[n % kValueStages].wait(n / kValueStages);
    }
    VSA_DEVICE void issue_scores(int i) {
      s_.k_full.wait(begin_ + i);
      mma_ABt<Element>(scores_, s_.q, s_.k);
      wgmma_commit();
    }
    VSA_DEVICE void issue_output(int i) {
      if (i == 0 || !Config::kOverlap) wait_values(i);
      mma_AB<Element>(out_, weights_, s_.v[(begin_ + i) % kValueStages]);
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
        named_sync(consumer_barrier(0), kWarpgroupThreads);  // the tile is free again
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
      write_tile(s_.q, rounded, at.rows_before());
      fence_async_proxy();
      named_sync(consumer_barrier(0), kWarpgroupThreads);
      if (elect_one()) {
        const TileBox box = store_box_of(to, at, work.head, work.batch);
        store_tile(box.map, box.at, s_.q);
        bulk_commit();
        bulk_wait_read<0>();
      }
    }

    const Params& p_;
    SharedMemory& s_;
    HeadOrigin keys_from_, values_from_;
    Softmax softmax_;
    Fragment<64> scores_;
    Operand<64> weights_;
    Fragment<D> out_;
    int begin_ = 0, total_ = 0;  // tile loads before this work tile, and its own
  };

  VSA_DEVICE static void run(const Params& p, SharedMemory& s) {
    if (elect_one()) init_barriers(s);
    VSA_EACH_LANE(t) { prologue(p, s, t, kWarpgroupThreads); }
    named_sync(consumer_barrier(0), kWarpgroupThreads);
    Consumer(p, s).run();
  }
};

}  // namespace vsa
