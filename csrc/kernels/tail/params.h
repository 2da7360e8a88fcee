// SPDX-License-Identifier: Apache-2.0
// What the kernels of the tail are told.
#pragma once
#include "kernels/fine/backward_rows.h"
#include "kernels/schedule/work_list.h"

namespace vsa {

// Means of keys and values as 16-bit matrices, and what their sizes add to scores. A mean of keys
// is the sum of two: scores from the first alone would be several times as wrong, where they are
// large, as those of keys, which are 16-bit numbers to begin with.
struct TailKeys {
  MappedTokens k, k_low, v;  // [batch, kv_heads, tiles, head_dim], tiles along w
  const float* bias;         // [chunks, 64] log2 of the tiles' sizes, -inf past the last tile
  int tiles;

  VSA_HD int chunks() const { return ceil_div(tiles, kTileRows); }
};

// FineParams: of the fine stage's kernel with this epilogue; its keys are not used
template <class FineParams>
struct TailForwardParams : FineParams {
  TiledSequence queries;  // instead of the fine stage's, whose tiles may be padded
  TailKeys tail;
  bool text;  // whether tiles of text are worked on
};

struct TailBackwardParams {
  TokenTensor q, grad_out, grad_q;
  TailKeys tail;
  TiledSequence queries;
  const uint32_t* bitmap;           // [batch, heads, n_q, words(n_k)] key tiles of each query tile
  const RowStats* row_stats;        // [batch, heads, tiles of the queries, the text's last]
  TokenRows<uint16_t> grad_q_rows;  // grad_q once more, to be read
  float* parts;  // [splits, 2, batch, kv_heads, n_k, head_dim] sums of k, sums of v
  int splits;
  int batch, heads, kv_heads;
  float scale;       // of the scores
  float scale_log2;  // the same times log2(e)

  VSA_DEVICE const RowStats& stats(int batch_index, int head, int tile) const {
    return row_stats[(int64_t{batch_index} * heads + head) * queries.num_tiles() + tile];
  }
  VSA_DEVICE const uint32_t* bitmap_row(int batch_index, int head, int tile) const {
    const int words = bitmap::words(tail.tiles);
    return bitmap_of(bitmap, batch_index, heads, head, queries.grid.num_tiles(), words) +
           tile * words;
  }
};

}  // namespace vsa
