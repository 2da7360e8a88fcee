// SPDX-License-Identifier: Apache-2.0
// A small attention kernel that uses most of the platform, and its mutants.
// Dense: two consumers own two query tiles, and walk all key tiles of the grid.
//
//   S = Q K^T    P = exp2(scale S - running maximum)    O = P V / sum P
//
//   q_full[w]    arrives: producer and bytes    waits: consumer w
//   q_empty[w]   arrives: consumer w            waits: producer; also says that O has been stored
//   ring         K and V of a tile
#pragma once
#include "mutants.h"
#include "shared_ring.h"
#include "tile/tile.h"

namespace vsa::test {

template <class Element_, int D_, class Mutants = NoMutants>
struct Attention {
  using Element = Element_;
  static constexpr int D = D_, kStages = 2, kConsumers = 2;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads;
  static constexpr int kProducers = 1;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr float kThreshold = 8;  // in powers of two: how stale a maximum may get

  struct Params {
    TensorMap q, k, v, o;
    Grid grid;
    float scale;  // of scores, times log2(e)
  };
  struct SharedMemory {
    Tile<D> q[kConsumers];  // O leaves through it
    Tile<D> k[kStages], v[kStages];
    SharedRing<kStages> ring;
    Mbarrier q_full[kConsumers], q_empty[kConsumers];
    Shared<uint64_t> valid[kStages];  // rows of K that are tokens
  };

  static VSA_DEVICE void init_barriers(SharedMemory& s) {
    s.ring.init(kConsumers, "kv_full", "kv_empty");
    for (int i = 0; i < kStages; ++i) {
      label(s.k[i], "k", i);
      label(s.v[i], "v", i);
      label(s.valid[i], "valid", i);
    }
    for (int i = 0; i < kConsumers; ++i) {
      s.q_full[i].init(1, "q_full", i);
      s.q_empty[i].init(1, "q_empty", i);
      label(s.q[i], "q", i);
    }
  }

  static VSA_DEVICE void prologue(const Params& p, SharedMemory& s, int thread, int threads) {
    const int rows = p.grid.tile.volume();
    if (Mutants::mutant == Mutant::NoTailZeros) return;
    for (int i = 0; i < kConsumers; ++i) zero_tail(s.q[i], rows, thread, threads);
    for (int i = 0; i < kStages; ++i) {
      zero_tail(s.k[i], rows, thread, threads);
      zero_tail(s.v[i], rows, thread, threads);
    }
    if (Mutants::mutant != Mutant::NoTailFence) fence_async_proxy();
  }

  static VSA_DEVICE BoxCoordinates box_of(const Grid& grid, int tile) {
    const Axes at = grid.place(tile).first;
    return {0, at.w, at.h, at.t, 0};
  }
  static VSA_DEVICE int groups(const Grid& grid) { return ceil_div(grid.num_tiles(), kConsumers); }

  static VSA_DEVICE void produce(const Params& p, SharedMemory& s, int) {
    if (!elect_lane()) return;
    prefetch_map(p.q);
    const int bytes = p.grid.tile.volume() * D * 2;
    int n = 0, item = 0;
    for (int group = block_index(); group < groups(p.grid); group += block_count(), ++item) {
      for (int w = 0; w < kConsumers; ++w) {
        const int tile = group * kConsumers + w;
        if (tile >= p.grid.num_tiles()) break;
        s.q_empty[w].wait(item - 1);
        s.q_full[w].arrive_expect_tx(bytes);
        load_tile(s.q[w], p.q, box_of(p.grid, tile), s.q_full[w], CacheHint::EvictFirst);
      }
      for (int tile = 0; tile < p.grid.num_tiles(); ++tile, ++n) {
        const int i = n % kStages;
        if (Mutants::mutant != Mutant::NoEmptyWait) s.ring.wait_empty(n);
        s.valid[i].set(p.grid.row_mask(tile));
        Mbarrier& full = s.ring.full[i];
        if (Mutants::mutant == Mutant::ExpectsNothing)
          full.arrive_one();
        else
          s.ring.expect(n, 2 * (Mutants::mutant == Mutant::ExpectsTooMuch     ? kTileRows * D * 2
                                : Mutants::mutant == Mutant::ExpectsTooLittle ? bytes / 2
                                                                              : bytes));
        load_tile(s.k[i], p.k, box_of(p.grid, tile), full);
        load_tile(s.v[i], p.v, box_of(p.grid, tile), full);
      }
    }
    if (Mutants::mutant == Mutant::LoadsTooMany)
      load_tile(s.k[n % kStages], p.k, box_of(p.grid, 0), s.ring.acquire(n, bytes));
  }

  static VSA_DEVICE void score(Fragment<64>& scores, const Tile<D>& q, const Tile<D>& k) {
    if (Mutants::mutant == Mutant::WrongStride || Mutants::mutant == Mutant::WrongStep ||
        Mutants::mutant == Mutant::NoWgmmaFence) {
      if (Mutants::mutant != Mutant::NoWgmmaFence) wgmma_fence();
      const uint32_t step = Mutants::mutant == Mutant::WrongStep ? 64 : 32;
      const uint32_t stride = (Mutants::mutant == Mutant::WrongStride ? 4 : 8) * kRowBytes;
      for (int j = 0; j < 4; ++j)
        wgmma<Element, false, false>(scores, descriptor(q.address() + j * step, 16, stride),
                                     descriptor(k.address() + j * step, 16, stride), j > 0);
    } else {
      mma_ABt<Element>(scores, q, k);
    }
  }

  static VSA_DEVICE void add_values(Fragment<D>& out,
                                    const Operand<64>& weights,
                                    const Tile<D>& v) {
    if (Mutants::mutant == Mutant::WrongLeading || Mutants::mutant == Mutant::NoTranspose) {
      wgmma_fence();
      const uint32_t leading =
          Mutants::mutant == Mutant::WrongLeading ? kPanelBytes / 2 : kPanelBytes;
      for (int j = 0; j < 4; ++j) {
        const uint64_t values =
            descriptor(v.address() + j * kReduction * kRowBytes, leading, kSwizzleBytes);
        if (Mutants::mutant == Mutant::NoTranspose)
          wgmma<Element, false>(out, weights, j, values, true);
        else
          wgmma<Element, true>(out, weights, j, values, true);
      }
    } else {
      mma_AB<Element>(out, weights, v);
    }
  }

  static VSA_DEVICE void consume(const Params& p, SharedMemory& s, int w) {
    int n = 0, item = 0;
    for (int group = block_index(); group < groups(p.grid); group += block_count(), ++item) {
      const int tile = group * kConsumers + w;
      if (tile < p.grid.num_tiles()) {
        attend(p, s, w, tile, item, n);
      } else {
        for (int other = 0; other < p.grid.num_tiles(); ++other, ++n)
          Mutants::mutant == Mutant::ReleasedUnseen ? s.ring.release(n) : s.ring.skip(n);
      }
    }
  }

  static VSA_DEVICE void attend(const Params& p,
                                SharedMemory& s,
                                int w,
                                int tile,
                                int item,
                                int& n) {
    const float scale = p.scale;
    Fragment<64> scores;
    Fragment<D> out;
    Operand<64> weights;
    RowValues peak, sum, top, factor;  // peak: what P is relative to; may lag behind top
    fill(out, 0.f);
    fill(peak, -INFINITY);
    fill(sum, 0.f);
    s.q_full[w].wait(item);
    for (int key = 0; key < p.grid.num_tiles(); ++key, ++n) {
      const int i = n % kStages;
      if (Mutants::mutant != Mutant::NoFullWait)
        Mutants::mutant == Mutant::WrongPhase ? s.ring.full[i].wait(n / kStages + 1)
                                              : s.ring.wait(n);
      const uint64_t valid = s.valid[i].get();
      score(scores, s.q[w], s.k[i]);
      wgmma_commit();
      if (Mutants::mutant == Mutant::WaitTooShallow)
        wgmma_wait<1>(scores);
      else if (Mutants::mutant != Mutant::NoProductWait)
        wgmma_wait<0>(scores);
      if (Mutants::mutant == Mutant::EarlyRelease) s.ring.release(n);
      if (valid != ~uint64_t{0} && Mutants::mutant != Mutant::NoMask)
        for_each(scores, [=](float& x, int, int column) {
          if ((valid >> column & 1) == 0) x = -INFINITY;
        });

      const auto larger = [](float a, float b) { return max2(a, b); };
      zip(top, peak, [](float, float old) { return old; });
      fold_rows(top, scores, larger);
      quad_reduce(top, larger);
      zip(factor, top, [](float, float now) { return now; });
      zip(factor, peak, [=](float now, float old) { return (now - old) * scale; });
      if_any_row(
          factor, [](float risen) { return risen > kThreshold; },
          [&] {
            zip(peak, top, [](float, float now) { return now; });
            zip(factor, factor, [](float, float risen) { return exp2_approx(-risen); });
            zip(sum, factor, [](float old, float by) { return old * by; });
            scale_rows(out, factor);
            if (Mutants::mutant == Mutant::DivergedRelease) s.ring.release(n);
          });
      map_rows(scores, peak,
               [=](float x, float m) { return exp2_approx(fma(x, scale, -m * scale)); });
      fold_rows(sum, scores, [](float a, float b) { return a + b; });
      round_to<Element>(weights, scores);
      add_values(out, weights, s.v[i]);
      wgmma_commit();
      if (Mutants::mutant == Mutant::OperandReused) round_to<Element>(weights, scores);
      wgmma_wait<0>(out);
      if (Mutants::mutant != Mutant::EarlyRelease &&
          (Mutants::mutant != Mutant::LostArrive || key != 1))
        s.ring.release(n);
      if (Mutants::mutant == Mutant::DoubleRelease && key == 1) s.ring.release(n);
    }
    if (Mutants::mutant == Mutant::LoneRelease) {
      if (elect_one()) s.q_empty[w].arrive_one();
      return;
    }
    quad_reduce(sum, [](float a, float b) { return a + b; });
    map_rows(out, sum, [](float x, float total) { return x / total; });
    store(p, s, w, tile, out);
  }

  static VSA_DEVICE void store(const Params& p,
                               SharedMemory& s,
                               int w,
                               int tile,
                               const Fragment<D>& out) {
    Operand<D> rounded;
    round_to<Element>(rounded, out);
    write_tile(s.q[w], rounded);
    if (Mutants::mutant == Mutant::PlainStores) note_write(&s.q[w], sizeof s.q[w]);
    if (Mutants::mutant != Mutant::NoProxyFence) fence_async_proxy();
    if (Mutants::mutant != Mutant::NoNamedBarrier) named_sync(1 + w, kWarpgroupThreads);
    if (Mutants::mutant == Mutant::NotElected || elect_one()) {
      store_tile(p.o, box_of(p.grid, tile), s.q[w]);
      bulk_commit();
      if (Mutants::mutant == Mutant::StoreBufferReused) s.q_empty[w].arrive_one();
      if (Mutants::mutant != Mutant::StoreNotAwaited) bulk_wait_read<0>();
      if (Mutants::mutant != Mutant::StoreBufferReused) s.q_empty[w].arrive_one();
    }
  }
};

}  // namespace vsa::test
