// SPDX-License-Identifier: Apache-2.0
// The tail: key tiles that a query tile did not choose, each of them one more key of its softmax,
//
//   s_j = scale q . mean k_j + log2(size_j)        with the value mean v_j
//
// in base 2. Its kernels take the means 64 at a time, in chunks, all of them in turn: those of the
// tiles that were chosen are masked, as the bitmap says.
#pragma once
#include "kernels/tail/params.h"
#include "tile/ring.h"

namespace vsa {

struct TailChunk {
  // Where a chunk of a key head lies.
  VSA_DEVICE static BoxCoordinates box(const MappedTokens& x, int chunk, int head, int batch) {
    return {head * x.channels_per_head, chunk * kTileRows, 0, 0,
            head * x.outer_per_head + batch * x.outer_per_batch};
  }

  // Of a chunk, the tiles that a query tile did not choose. row: of the bitmap
  VSA_DEVICE static uint64_t left_out(int tiles, const uint32_t* row, int chunk) {
    constexpr int kWords = kTileRows / kWordBits;
    const int first = chunk * kWords, left = tiles - chunk * kTileRows;
    const uint64_t low = load_global(row + first);
    const uint64_t high = left > kWordBits ? load_global(row + first + 1) : 0;
    const uint64_t chosen = high << kWordBits | low;
    return ~chosen & (left < kTileRows ? (uint64_t{1} << left) - 1 : ~uint64_t{0});
  }
};

// The chunks that pass by the consumers of a block, all of which take every one of them.
//
//   barrier   arrives                                    waits
//   full      the producer of means, and its bytes       the consumers
//   empty     all threads of all consumers               that producer
template <int D, int Stages, int Consumers>
struct TailRing {
  static constexpr int kBytes = 3 * sizeof(Tile<D>) + kTileRows * sizeof(float);  // of a chunk

  Tile<D> ks[Stages];
  Tile<D> ks_low[Stages];
  Tile<D> vs[Stages];
  alignas(kChunkBytes) float biases[Stages][kTileRows];
  Mbarrier full[Stages];
  Mbarrier empty[Stages];

  VSA_DEVICE void init() {
    for (int i = 0; i < Stages; ++i) {
      full[i].init(1, "tail_full", i);
      empty[i].init(Consumers * kWarpgroupThreads, "tail_empty", i);
      label(ks[i], "mean_k", i);
      label(ks_low[i], "mean_k_low", i);
      label(vs[i], "mean_v", i);
      label(biases[i], "bias", i);
    }
  }

  // The producer, one thread. n: chunks that it has loaded before, of all work tiles
  VSA_DEVICE void load(const TailKeys& keys, int n, int chunk, int head, int batch) {
    const int at = Ring<Stages>::stage(n);
    empty[at].wait(Ring<Stages>::use(n) - 1);
    full[at].arrive_expect_tx(kBytes);
    const auto load = [&](Tile<D>& to, const MappedTokens& from) {
      load_tile(to, from.map, TailChunk::box(from, chunk, head, batch), full[at]);
    };
    load(ks[at], keys.k);
    load(ks_low[at], keys.k_low);
    load(vs[at], keys.v);
    bulk_load(biases[at], keys.bias + chunk * kTileRows, kTileRows * sizeof(float), full[at]);
  }

  // The producer: every chunk for each work tile. sharing: query heads of a key head
  template <class Work>
  VSA_DEVICE void load_all(const TailKeys& keys, const Work& work, int sharing) {
    prefetch_map(keys.k.map);
    prefetch_map(keys.k_low.map);
    prefetch_map(keys.v.map);
    const int chunks = keys.chunks();
    int n = 0;  // chunks that have been loaded
    work.for_each_work_tile([&](const WorkTile& of) {
      for (int chunk = 0; chunk < chunks; ++chunk)
        load(keys, n++, chunk, of.head / sharing, of.batch);
    });
  }

  // Consumers, whole warpgroups.
  VSA_DEVICE void wait(int n) { full[Ring<Stages>::stage(n)].wait(Ring<Stages>::use(n)); }
  VSA_DEVICE void release(int n) { empty[Ring<Stages>::stage(n)].arrive_all(); }
  VSA_DEVICE const Tile<D>& k(int n) const { return ks[Ring<Stages>::stage(n)]; }
  VSA_DEVICE const Tile<D>& k_low(int n) const { return ks_low[Ring<Stages>::stage(n)]; }
  VSA_DEVICE const Tile<D>& v(int n) const { return vs[Ring<Stages>::stage(n)]; }
  VSA_DEVICE const float* bias(int n) const { return biases[Ring<Stages>::stage(n)]; }
};

// The work tiles of a kernel over query tiles, for ResidentTiles. They take equally long, so block
// b of n takes those of the numbers b, b + n, ...
template <int Consumers>
struct TailWork {
  int first, groups, heads, size;  // first: place in the order of work

  // text: whether tiles of text are worked on
  VSA_HD TailWork(const TiledSequence& queries, int batch, int heads, bool text)
      : first(text ? 0 : queries.text_tiles),
        groups(ceil_div(queries.num_tiles() - first, Consumers)),
        heads(heads),
        size(batch * heads * groups) {}

  template <class Fn>
  VSA_DEVICE void for_each_work_tile(Fn fn) const {
    for (int index = block_index(); index < size; index += block_count()) {
      const int head = index / groups;
      fn(WorkTile{head / heads, head % heads, first + index % groups * Consumers, kAlongW});
    }
  }
};

}  // namespace vsa
