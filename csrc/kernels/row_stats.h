// SPDX-License-Identifier: Apache-2.0
// What the backward passes need to know of every query: its log-sum-exp, and
//
//   delta = sum over channels of dO * O, minus the gradient of the log-sum-exp
//
// in tile order, so that the numbers of a tile are one contiguous copy. Rows that are no tokens or
// attend nothing get a log-sum-exp of +inf: their weights come out as 0.
#pragma once
#include "kernels/params.h"

namespace vsa {

struct RowStats {
  float lse[kTileRows];  // base 2
  float delta[kTileRows];
};

// A tensor that is read token by token.
struct TokenRows {
  const uint16_t* data;  // [batch, tokens, heads, head_dim]
  int64_t batch_stride, token_stride, head_stride;  // elements

  VSA_DEVICE const uint16_t* row(int batch, int token, int head) const {
    return data + batch * batch_stride + token * token_stride + head * head_stride;
  }
};

struct RowStatsParams {
  TokenRows out, grad_out;
  const float* lse;       // [batch, heads, S_q] natural logarithm
  const float* grad_lse;  // likewise, or null for zeros
  TiledSequence queries;
  RowStats* stats;  // [batch, heads, tiles of the queries, the text's last]
  int heads;
};

// A lane's share of the sum over D channels, of 32 lanes.
template <class Element, int D>
VSA_DEVICE float part_of_delta(const uint16_t* out, const uint16_t* grad_out, int lane) {
  constexpr int kPairs = D / (2 * kWarpThreads);
  float sum = 0;
  VSA_UNROLL
  for (int i = 0; i < kPairs; ++i) {
    const int pair = lane * kPairs + i;
    const uint32_t a = load_global(reinterpret_cast<const uint32_t*>(out) + pair);
    const uint32_t b = load_global(reinterpret_cast<const uint32_t*>(grad_out) + pair);
    sum = fma(widen_low<Element>(a), widen_low<Element>(b), sum);
    sum = fma(widen_high<Element>(a), widen_high<Element>(b), sum);
  }
  return sum;
}

// One row of a tile. sum_lanes(part): all lanes' parts together, part(lane) -> float.
template <class Element, int D, class SumLanes>
VSA_DEVICE void write_row_stats(
    const RowStatsParams& p, int batch, int head, int tile, int row, SumLanes sum_lanes) {
  constexpr float kLog2e = 1.44269504f;
  const TilePlace at = p.queries.place(tile);
  const int64_t of_head = int64_t{batch} * p.heads + head;
  RowStats& stats = p.stats[of_head * p.queries.num_tiles() + tile];
  float lse = INFINITY, delta = 0;
  if (p.queries.rows(at, batch) >> row & 1) {
    const int token = p.queries.token(at, row);
    const int64_t index = of_head * p.queries.grid.num_tokens() + token;
    const uint16_t* out = p.out.row(batch, token, head);
    const uint16_t* grad_out = p.grad_out.row(batch, token, head);
    const float natural = load_global(p.lse + index);
    delta = sum_lanes([&](int lane) { return part_of_delta<Element, D>(out, grad_out, lane); });
    if (p.grad_lse != nullptr) delta -= load_global(p.grad_lse + index);
    if (natural != -INFINITY) lse = natural * kLog2e;
  }
  stats.lse[row] = lse;
  stats.delta[row] = delta;
}

}  // namespace vsa
