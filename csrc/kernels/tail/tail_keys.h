// SPDX-License-Identifier: Apache-2.0
// The tail: key tiles that a query tile did not choose, each of them one more key of its softmax,
//
//   s_j = scale q . mean k_j + log2(size_j)        with the value mean v_j
//
// in base 2. Its kernels take the means 64 at a time, in chunks, all of them in turn: those of the
// tiles that were chosen are masked, as the bitmap says.
#pragma once
#include "kernels/schedule/work_list.h"
#include "tile/ring.h"

namespace vsa {

// Means of keys and values as 16-bit matrices, and what their sizes add to scores.
struct TailKeys {
  MappedTokens k, v;  // [batch, kv_heads, tiles, head_dim], tiles along w
  const float* bias;  // [chunks, 64] log2 of the tiles' sizes, -inf past the last tile
  int tiles;

  VSA_DEVICE int chunks() const { return ceil_div(tiles, kTileRows); }
  VSA_DEVICE static BoxCoordinates box(const MappedTokens& x, int chunk, int head, int batch) {
    return {head * x.channels_per_head, chunk * kTileRows, 0, 0,
            head * x.outer_per_head + batch * x.outer_per_batch};
  }
  // Of a chunk, the tiles that a query tile did not choose. row: of the bitmap
  VSA_DEVICE uint64_t left_out(const uint32_t* row, int chunk) const {
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
  static constexpr int kBytes = 2 * sizeof(Tile<D>) + kTileRows * sizeof(float);  // of a chunk

  Tile<D> k[Stages];
  Tile<D> v[Stages];
  alignas(kChunkBytes) float bias[Stages][kTileRows];
  Mbarrier full[Stages];
  Mbarrier empty[Stages];

  VSA_DEVICE void init() {
    for (int i = 0; i < Stages; ++i) {
      full[i].init(1, "tail_full", i);
      empty[i].init(Consumers * kWarpgroupThreads, "tail_empty", i);
      label(k[i], "mean_k", i);
      label(v[i], "mean_v", i);
      label(bias[i], "bias", i);
    }
  }
  VSA_DEVICE static int stage(int n) { return Ring<Stages>::stage(n); }

  // The producer, one thread. n: chunks that it has loaded before, of all work tiles
  VSA_DEVICE void load(const TailKeys& keys, int n, int chunk, int head, int batch) {
    const int at = stage(n);
    empty[at].wait(Ring<Stages>::use(n) - 1);
    full[at].arrive_expect_tx(kBytes);
    load_tile(k[at], keys.k.map, TailKeys::box(keys.k, chunk, head, batch), full[at]);
    load_tile(v[at], keys.v.map, TailKeys::box(keys.v, chunk, head, batch), full[at]);
    bulk_load(bias[at], keys.bias + chunk * kTileRows, kTileRows * sizeof(float), full[at]);
  }
  // Consumers, whole warpgroups.
  VSA_DEVICE void wait(int n) { full[stage(n)].wait(Ring<Stages>::use(n)); }
  VSA_DEVICE void release(int n) { empty[stage(n)].arrive_all(); }
};

// The work tiles of a kernel over query tiles, for ResidentTiles. They take equally long, so block
// b of n takes those of the numbers b, b + n, ...
template <int Consumers>
struct TailWork {
  int first, groups, heads, size;  // first: place in the order of work

  // text: whether tiles of text are worked on
  VSA_DEVICE TailWork(const TiledSequence& queries, int batch, int heads, bool text)
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
