// SPDX-License-Identifier: Apache-2.0
// What the forward kernel does to its output before it is rounded and stored: nothing, or combine,
//
//   out = gate_fine * fine + gate_coarse * coarse[tile of the token]
//
// on the accumulators themselves. The fine stage's part is written, rounded, only where a backward
// wants it. The epilogue is part of the kernel's type: the kernel without gates has no trace of it.
#pragma once
#include "kernels/fine/forward_params.h"
#include "kernels/fine/gates.h"
#include "tile/fragment.h"

namespace vsa {

struct PlainOutput {
  using Params = FineForwardParams;

  template <class Element, int D, class AnyParams, class Write>
  VSA_DEVICE static void finish(Fragment<D>&,
                                const AnyParams&,
                                const Assignment&,
                                const TilePlace&,
                                uint64_t,
                                Write) {}
};

struct GatedForwardParams : FineForwardParams {
  TokenTensor fine;  // where the fine stage's part goes
  bool keeps_fine;   // whether it is wanted
  Gate gate_fine, gate_coarse;
  const float* coarse;  // [batch, heads, n, head_dim], with gate_coarse
};

struct GatedOutput {
  using Params = GatedForwardParams;

  // rows: of the tile, those that are real tokens; the others stay as they are
  // write(to): the tile as it is, rounded, to a tensor
  // AnyParams: Params, or more
  template <class Element, int D, class AnyParams, class Write>
  VSA_DEVICE static void finish(Fragment<D>& out,
                                const AnyParams& p,
                                const Assignment& work,
                                const TilePlace& at,
                                uint64_t rows,
                                Write write) {
    if (p.keeps_fine) write(p.fine);
    if (p.gate_fine.data != nullptr)
      apply<Element>(out, p.gate_fine, p.queries, work, at, rows,
                     [](float x, float gate, int) { return x * gate; });
    if (p.gate_coarse.data == nullptr || at.region != Region::Video) return;
    const float* coarse =
        coarse_row<D>(p.coarse, p.queries, int64_t{work.batch} * p.heads + work.head, work.tile);
    apply<Element>(out, p.gate_coarse, p.queries, work, at, rows,
                   [=](float x, float gate, int channel) {
                     return fma(gate, load_global(coarse + channel), x);
                   });
  }

 private:
  // x = fn(x, gate, channel) for all channels of the tokens. Each way of reading has a loop of its
  // own without branches, so that the loads of many channels are in flight together.
  template <class Element, int D, class Sequence, class Fn>
  VSA_DEVICE static void apply(Fragment<D>& out,
                               const Gate& gate,
                               const Sequence& queries,
                               const Assignment& work,
                               const TilePlace& at,
                               uint64_t rows,
                               Fn fn) {
    if (gate.vectorized)
      apply_as<Element, Gate::Reading::Vectorized>(out, gate, queries, work, at, rows, fn);
    else if (gate.fp32)
      apply_as<Element, Gate::Reading::Fp32>(out, gate, queries, work, at, rows, fn);
    else
      apply_as<Element, Gate::Reading::Scalar>(out, gate, queries, work, at, rows, fn);
  }

  template <class Element, Gate::Reading How, int D, class Sequence, class Fn>
  VSA_DEVICE static void apply_as(Fragment<D>& out,
                                  const Gate& gate,
                                  const Sequence& queries,
                                  const Assignment& work,
                                  const TilePlace& at,
                                  uint64_t rows,
                                  Fn fn) {
    VSA_EACH_LANE(t) {
      auto& x = lane(out, t);
      VSA_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = accumulator_row(t, 2 * half);
        if ((rows >> row & 1) == 0) continue;
        const int token = queries.token(at, row);
        const int64_t offset = gate.offset(work.batch, token, work.head);
        VSA_UNROLL
        for (int i = 2 * half; i < D / 2; i += 4) {
          const int channel = accumulator_column(t, i);
          float of_channels[2];
          gate.read<Element, How>(of_channels, offset, channel);
          VSA_UNROLL
          for (int c = 0; c < 2; ++c) x[i + c] = fn(x[i + c], of_channels[c], channel + c);
        }
      }
    }
  }
};

}  // namespace vsa
