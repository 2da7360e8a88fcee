// SPDX-License-Identifier: Apache-2.0
// Coarse stage: the mean of the tokens of every tile, straight from the raster layout, for up to
// three tensors in one launch. Bound by memory: every value is read once, 16 bytes at a time.
//
// A lane owns a few neighbouring channels of one tile and head and adds up its tokens in raster
// order, some at a time. No lane needs another, and the order does not depend on strides, so views
// give the bits of copies and every machine the same ones.
#pragma once
#include "kernels/schedule/sequence.h"
#include "kernels/select/tile_rule.h"
#include "prim/warp.h"

namespace vsa {

struct TokensToMean {
  const void* data;                                 // [batch, tokens, heads, head_dim]
  int64_t batch_stride, token_stride, head_stride;  // elements; channels are contiguous
  Grid grid;
  TileSizes sizes;
  int64_t row_offsets[kTileRows];  // elements, of a tile's rows from its first
  int heads;
  float* means;   // [batch, heads, tiles, head_dim]
  int64_t lanes;  // that have something to do
};

struct TileMeansParams {
  static constexpr int kMost = 3;

  TokensToMean tensors[kMost];
  int count;     // of tensors
  int head_dim;  // the same for all
};

// Key tiles that no query tile may choose are not read, and their means are zeros.
struct MaskedTileMeansParams : TileMeansParams {
  TileRule rule;
  int first_of_keys;  // tensors from this one on are of keys
};

// Tokens are read for their means alone.
struct NotKept {
  using Params = TileMeansParams;
  static constexpr bool kKeeps = false;

  VSA_DEVICE NotKept(const Params&, int, int, int, int, int) {}
};

// Channels are taken N at a time. Masked: under a rule over tiles. Kept: see chunk_means.h.
template <class Element, int N, bool Masked = false, class Kept = NotKept>
class TileMeans {
 public:
  using Params = std::conditional_t<Masked, MaskedTileMeansParams, typename Kept::Params>;
  // Tokens whose loads are in flight together; they are added in pairs first, which is the more
  // exact way.
  static constexpr int kTogether = 8;

  // The lane's number counts channels, heads, tiles and batch elements, fastest first: neighbours
  // read neighbouring memory where heads lie inside a token.
  VSA_DEVICE static void run(const Params& p, int tensor, int64_t lane) {
    const TokensToMean& x = p.tensors[tensor];
    const int chunks = p.head_dim / N, tiles = x.grid.num_tiles();
    const int64_t per_batch = int64_t{tiles} * x.heads * chunks;
    const int batch = static_cast<int>(lane / per_batch);
    const int in_batch = static_cast<int>(lane % per_batch);
    const int channel = in_batch % chunks * N, row = in_batch / chunks;
    const int head = row % x.heads, tile = row / x.heads;

    const Place place = x.grid.place(tile);
    uint64_t real = x.sizes.known() ? x.sizes.first_rows(tile) : x.grid.rows[place.clip];
    if constexpr (Masked)
      if (tensor >= p.first_of_keys && !p.rule.sees(p.rule.layer.quotient(tile))) real = 0;
    const int64_t start = batch * x.batch_stride + head * x.head_stride +
                          x.grid.token(place, 0) * x.token_stride + channel;
    [[maybe_unused]] const Kept kept(p, tensor, batch, head, x.grid.token(place, 0), channel);
    Floats<N> total = {};
    uint64_t left = real;
    for (int at = 0; at < x.grid.tile.volume(); at += kTogether, left >>= kTogether) {
      Floats<N> token[kTogether];
      VSA_UNROLL
      for (int i = 0; i < kTogether; ++i) {
        const bool there = (left >> i & 1) != 0;
        const int64_t offset = there ? x.row_offsets[at + i] : 0;
        token[i] = load_floats<Element, N>(x.data, start + offset, there);
        if constexpr (Kept::kKeeps)
          if (there) kept.token(at + i, token[i]);
      }
      VSA_UNROLL
      for (int half = kTogether / 2; half > 0; half /= 2) {
        VSA_UNROLL
        for (int i = 0; i < half; ++i) add(token[i], token[i + half]);
      }
      add(total, token[0]);
    }

    const int tokens = popcount(real);
    const float size = static_cast<float>(tokens > 0 ? tokens : 1);  // no token: zeros
    int64_t first = ((int64_t{batch} * x.heads + head) * tiles + tile) * p.head_dim + channel;
    if constexpr (Kept::kKeeps) first = kept.mean(tile);
    VSA_UNROLL
    for (int c = 0; c < N; ++c) x.means[first + c] = total.x[c] / size;
  }

 private:
  VSA_DEVICE static void add(Floats<N>& total, const Floats<N>& more) {
    VSA_UNROLL
    for (int c = 0; c < N; ++c) total.x[c] += more.x[c];
  }
};

}  // namespace vsa
