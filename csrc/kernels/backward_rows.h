// SPDX-License-Identifier: Apache-2.0
// What comes before the two backward passes, in one pass over the tokens: the gradients of combine,
// and what the passes need to know of every query,
//
//   dO = gate_fine * gradient           dgate_fine = gradient * O
//   dcoarse = sum over the tile of      dgate_coarse = gradient * coarse
//             gate_coarse * gradient
//   delta = sum over channels of dO * O, minus the gradient of the log-sum-exp
//
// Statistics are in tile order, so that those of a tile are one contiguous copy. Rows that are no
// tokens or attend nothing get a log-sum-exp of +inf: their weights come out as 0.
#pragma once
#include "kernels/gates.h"

namespace vsa {

struct RowStats {
  float lse[kTileRows];  // base 2
  float delta[kTileRows];
};

struct BackwardRowsParams {
  TokenRows<const uint16_t> out, gradient;  // of the fine stage; that of the whole operation
  const float* lse;                         // [batch, heads, S_q] natural logarithm
  const float* grad_lse;                    // likewise, or null for zeros
  TiledSequence queries;
  RowStats* stats;  // [batch, heads, tiles of the queries, the text's last]
  int heads;
  // With gates:
  Gate gate_fine, gate_coarse;
  const float* coarse;  // [batch, heads, n, head_dim]
  TokenRows<uint16_t> grad_out;
  GateGradient grad_gate_fine, grad_gate_coarse;
  float* grad_coarse;  // [batch, heads, n, head_dim]
};

template <class Element, int D, bool Gated>
struct BackwardRows {
  using Lane = LanePairs<D>;
  // A lane's share of the tile's gradient of coarse.
  using CoarseSums = float[2 * Lane::kPairs];

  // One token, one lane: its share of delta. Gradients of gates are stored on the way. Text that is
  // not real has the gradient 0, whatever stands there.
  VSA_DEVICE static float token(const BackwardRowsParams& p,
                                const TilePlace& at,
                                int batch,
                                int head,
                                int tile,
                                int token,
                                bool real,
                                int lane,
                                CoarseSums& sums) {
    const bool has_fine_gate = Gated && p.gate_fine.data != nullptr;
    const bool has_coarse_gate = Gated && p.gate_coarse.data != nullptr;
    const bool has_coarse = has_coarse_gate && at.region == Region::Video;
    const int64_t of_head = int64_t{batch} * p.heads + head;
    const int64_t gate_fine = p.gate_fine.offset(batch, token, head);
    const int64_t gate_coarse = p.gate_coarse.offset(batch, token, head);
    const int64_t first_pair =
        ((int64_t{batch} * p.queries.grid.num_tokens() + token) * p.heads + head) * (D / 2);
    float delta = 0;
    VSA_UNROLL
    for (int i = 0; i < Lane::kPairs; ++i) {
      const int pair = lane * Lane::kPairs + i;
      const uint32_t out = Lane::load(p.out.row(batch, token, head), pair);
      uint32_t gradient = real ? Lane::load(p.gradient.row(batch, token, head), pair) : 0;
      const float o[2] = {widen_low<Element>(out), widen_high<Element>(out)};
      const float g[2] = {widen_low<Element>(gradient), widen_high<Element>(gradient)};
      if (has_coarse_gate) {
        float coarse[2] = {0, 0};
        VSA_UNROLL
        for (int c = 0; has_coarse && c < 2; ++c) {
          coarse[c] =
              load_global(Lane::coarse_row(p.coarse, p.queries, of_head, tile) + 2 * pair + c);
          sums[2 * i + c] =
              fma(g[c], p.gate_coarse.template value<Element>(gate_coarse, 2 * pair + c),
                  sums[2 * i + c]);
        }
        p.grad_gate_coarse.template store<Element>(first_pair + pair, g[0] * coarse[0],
                                                   g[1] * coarse[1]);
      }
      if (has_fine_gate) {
        p.grad_gate_fine.template store<Element>(first_pair + pair, g[0] * o[0], g[1] * o[1]);
        gradient =
            pack<Element>(g[0] * p.gate_fine.template value<Element>(gate_fine, 2 * pair),
                          g[1] * p.gate_fine.template value<Element>(gate_fine, 2 * pair + 1));
        reinterpret_cast<uint32_t*>(p.grad_out.row(batch, token, head))[pair] = gradient;
      }
      // From what the passes will read: the rounded numbers.
      delta = fma(widen_low<Element>(gradient), o[0], delta);
      delta = fma(widen_high<Element>(gradient), o[1], delta);
    }
    return delta;
  }

  // One row of a tile. sum_lanes(token, real): all lanes' shares of delta together.
  template <class SumLanes>
  VSA_DEVICE static void row(const BackwardRowsParams& p,
                             const TilePlace& at,
                             int batch,
                             int head,
                             int tile,
                             int row,
                             SumLanes sum_lanes) {
    constexpr float kLog2e = 1.44269504f;
    const int64_t of_head = int64_t{batch} * p.heads + head;
    const int token_index = p.queries.token(at, row);
    float lse = INFINITY, delta = 0;
    if (token_index >= 0) {
      const int64_t index = of_head * p.queries.grid.num_tokens() + token_index;
      const float natural = load_global(p.lse + index);
      const bool real = p.queries.rows(at, batch) >> row & 1;
      delta = sum_lanes(token_index, real);
      if (p.grad_lse != nullptr && real) delta -= load_global(p.grad_lse + index);
      if (real && natural != -INFINITY) lse = natural * kLog2e;
    }
    RowStats& stats = p.stats[of_head * p.queries.num_tiles() + tile];
    stats.lse[row] = lse;
    stats.delta[row] = delta;
  }
};

}  // namespace vsa
