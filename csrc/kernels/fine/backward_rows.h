// SPDX-License-Identifier: Apache-2.0
// The first pass of the backward, over the tokens: the gradients of combine, and what the other two
// passes need to know of every query,
//
//   dO = gate_fine * gradient           dgate_fine = gradient * O
//   dcoarse = sum over the tile of      dgate_coarse = gradient * coarse
//             gate_coarse * gradient
//   delta = sum over channels of dO * O, minus the gradient of the log-sum-exp
//
// Statistics are in tile order, so that one contiguous copy brings a tile's. Rows that are no
// tokens or attend nothing get a log-sum-exp of +inf: their weights come out as 0.
#pragma once
#include "kernels/fine/gates.h"

namespace vsa {

struct RowStats {
  float lse[kTileRows];  // base 2
  float delta[kTileRows];
};

struct BackwardRowsParams {
  TokenRows<const uint16_t> out, gradient;  // the fine stage's output; gradient of the operation's
  const float* lse;                         // [batch, heads, S_q] natural logarithm
  const float* grad_lse;                    // [batch, heads, S_q], or null for zeros
  PaddableSequence queries;
  RowStats* stats;  // [batch, heads, tiles of the queries, the text's last]
  int heads;
  // With gates:
  Gate gate_fine, gate_coarse;
  const float* coarse;  // [batch, heads, n, head_dim]
  TokenRows<uint16_t> grad_out;
  GateGradient grad_gate_fine, grad_gate_coarse;
  float* grad_coarse;  // [batch, heads, n, head_dim]
  float* grad_q_sums;  // [batch, heads, n, 8, 128, 4] where one pass adds up dQ, null without
};

template <class Element, int D, bool Gated>
struct BackwardRows {
  // Whose rows they are: a tile of one head.
  struct HeadTile {
    int batch, head, tile;
    TilePlace at;
    uint64_t rows;  // that are real tokens
    int first;      // token

    VSA_DEVICE HeadTile(const BackwardRowsParams& p, int batch, int head, int tile)
        : batch(batch),
          head(head),
          tile(tile),
          at(p.queries.place(tile)),
          rows(p.queries.rows(at, batch)),
          first(p.queries.readable_token(at)) {}
  };

  // Zeros where dQ of the tile will be added up, by any number of threads.
  VSA_DEVICE static void clear_sums(const BackwardRowsParams& p,
                                    const HeadTile& of,
                                    int thread,
                                    int threads) {
    if (p.grad_q_sums == nullptr) return;
    const int64_t of_head = int64_t{of.batch} * p.heads + of.head;
    Chunk* to = reinterpret_cast<Chunk*>(
        p.grad_q_sums + (of_head * p.queries.num_tiles() + of.tile) * kTileRows * D);
    for (int i = thread; i < kTileRows * D * 4 / kChunkBytes; i += threads) to[i] = Chunk{};
  }

  // One row of a tile, one lane. sum_lanes(x) adds up what the lanes of a token have. A row that is
  // no token reads the first one's numbers and keeps nothing of them, so that all lanes of a warp
  // do the same. `sums` are the lane's share of the tile's gradient of coarse.
  template <class SumLanes>
  VSA_DEVICE static void row(const BackwardRowsParams& p,
                             const HeadTile& of,
                             int row,
                             int channel,
                             Channels& sums,
                             SumLanes sum_lanes) {
    constexpr float kLog2e = 1.44269504f;
    const int64_t of_head = int64_t{of.batch} * p.heads + of.head;
    const int own = p.queries.token(of.at, row);
    const bool there = own >= 0, real = of.rows >> row & 1;
    const int token = there ? own : of.first;
    const int64_t index = of_head * p.queries.grid.num_tokens() + token;
    const float natural = load_global(p.lse + index);
    const float grad_lse = p.grad_lse != nullptr ? load_global(p.grad_lse + index) : 0;
    const float delta = sum_lanes(delta_of(p, of, {token, channel, there, real}, sums));
    RowStats& stats = p.stats[of_head * p.queries.num_tiles() + of.tile];
    stats.lse[row] = real && natural != -INFINITY ? natural * kLog2e : INFINITY;
    stats.delta[row] = real ? delta - grad_lse : delta;
  }

 private:
  // A lane's channels of a row.
  struct Share {
    int token, channel;
    bool there, real;  // the row is that token; and is no invalid text
  };

  // A lane's share of delta, 0 where the row is not real, whatever stands there. Gradients of gates
  // are stored on the way, zeros of invalid text among them.
  VSA_DEVICE static float delta_of(const BackwardRowsParams& p,
                                   const HeadTile& of,
                                   const Share& at,
                                   Channels& sums) {
    const Channels o = widen<Element>(p.out.load(of.batch, at.token, of.head, at.channel));
    Chunk gradient = p.gradient.load(of.batch, at.token, of.head, at.channel);
    VSA_UNROLL
    for (uint32_t& pair : gradient.pairs) pair = at.real ? pair : 0;
    if constexpr (Gated) {
      const Channels g = widen<Element>(gradient);
      if (p.gate_coarse.data != nullptr) grad_coarse_gate(p, of, at, g, sums);
      if (p.gate_fine.data != nullptr) gradient = grad_fine_gate(p, of, at, g, o);
    }
    // From what the passes will read: the rounded numbers.
    const Channels rounded = widen<Element>(gradient);
    float delta = 0;
    VSA_UNROLL
    for (int c = 0; c < kChunkElements; ++c) delta = fma(rounded.x[c], o.x[c], delta);
    return at.real ? delta : 0;
  }

  VSA_DEVICE static int64_t first_channel(const BackwardRowsParams& p,
                                          const HeadTile& of,
                                          const Share& at) {
    const int64_t tokens = p.queries.grid.num_tokens();
    return ((of.batch * tokens + at.token) * p.heads + of.head) * D + at.channel;
  }

  VSA_DEVICE static void grad_coarse_gate(const BackwardRowsParams& p,
                                          const HeadTile& of,
                                          const Share& at,
                                          const Channels& g,
                                          Channels& sums) {
    Channels gradient = {};
    if (of.at.region == Region::Video) {
      const int64_t of_head = int64_t{of.batch} * p.heads + of.head;
      const float* coarse = coarse_row<D>(p.coarse, p.queries, of_head, of.tile) + at.channel;
      const Channels gate = p.gate_coarse.template values<Element>(
          p.gate_coarse.offset(of.batch, at.token, of.head), at.channel);
      VSA_UNROLL
      for (int c = 0; c < kChunkElements; ++c) {
        gradient.x[c] = g.x[c] * load_global(coarse + c);
        if (at.there) sums.x[c] = fma(g.x[c], gate.x[c], sums.x[c]);
      }
    }
    if (at.there) p.grad_gate_coarse.template store<Element>(first_channel(p, of, at), gradient);
  }

  // dO, as the passes will read it.
  VSA_DEVICE static Chunk grad_fine_gate(const BackwardRowsParams& p,
                                         const HeadTile& of,
                                         const Share& at,
                                         const Channels& g,
                                         const Channels& o) {
    const Channels gate = p.gate_fine.template values<Element>(
        p.gate_fine.offset(of.batch, at.token, of.head), at.channel);
    Channels of_gate, of_fine;
    VSA_UNROLL
    for (int c = 0; c < kChunkElements; ++c) {
      of_gate.x[c] = g.x[c] * o.x[c];
      of_fine.x[c] = at.real ? g.x[c] * gate.x[c] : 0;
    }
    const Chunk rounded = narrow<Element>(of_fine);
    if (at.there) {
      p.grad_gate_fine.template store<Element>(first_channel(p, of, at), of_gate);
      p.grad_out.store(of.batch, at.token, of.head, at.channel, rounded);
    }
    return rounded;
  }
};

}  // namespace vsa
