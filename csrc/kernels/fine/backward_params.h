// SPDX-License-Identifier: Apache-2.0
// What the backward passes of the fine stage are told.
#pragma once
#include "kernels/fine/backward_rows.h"
#include "kernels/fine/mean_gradient.h"

namespace vsa {

struct FineBackwardParams {
  TokenTensor q, k, v, grad_out;
  TokenTensor grad_q, grad_k, grad_v;
  MeanGradient grad_q_means, grad_k_means, grad_v_means;
  PaddableSequence queries, keys;
  const uint32_t* bitmap;  // [batch, heads, n_q, words(n_k)] key tiles of each query tile
  const uint32_t*
      transposed_bitmap;      // [batch, heads, n_k, words(n_q)] query tiles of each key tile
  const RowStats* row_stats;  // [batch, heads, tiles of the queries, the text's last]
  const int* query_axes;      // [batch, heads] along which query tiles are neighbours
  const int* key_axes;        // [batch, kv_heads] along which key tiles are neighbours
  GroupOrder key_order, query_order;
  int* key_tile_counter;    // work tiles of the pass over keys that blocks have taken: 0 at first
  int* query_tile_counter;  // the same of the pass over queries
  float* grad_q_sums;       // [batch, heads, n_q, 8, 128, 4] dQ / scale, in one pass
  int batch, heads, kv_heads;
  float scale;       // of the scores
  float scale_log2;  // the same times log2(e)

  VSA_DEVICE float* sums(int batch_index, int head, int tile) const {
    return grad_q_sums +
           ((int64_t{batch_index} * heads + head) * queries.num_tiles() + tile) * kTileRows * 64;
  }
  VSA_DEVICE const RowStats& stats(int batch_index, int head, int tile) const {
    return row_stats[(int64_t{batch_index} * heads + head) * queries.num_tiles() + tile];
  }
};

}  // namespace vsa
