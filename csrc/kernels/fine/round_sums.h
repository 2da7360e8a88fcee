// SPDX-License-Identifier: Apache-2.0
// The end of a backward in one pass: dQ, added up in fp32 in the order of accumulators, is scaled,
// gets its share of the gradient of means, and is rounded and stored, token by token.
#pragma once
#include "kernels/fine/backward_params.h"

namespace vsa {

struct RoundSumsParams {
  const float* sums;  // [batch, heads, n_q, 8, 128, 4]
  TokenRows<uint16_t> grad_q;
  MeanGradient means;
  PaddableSequence queries;  // without text, no padded tiles
  int heads;
  float scale;
};

// Eight channels of two rows, 8 apart: they lie in 64 contiguous bytes.
template <class Element>
struct RoundSums {
  static constexpr int kHeadDim = 64, kThreads = kTileRows / 2 * kHeadDim / kChunkElements;

  // thread: of kThreads for each tile
  VSA_DEVICE static void rows(const RoundSumsParams& p, int batch, int head, int tile, int thread) {
    const int channels = thread % 8, pair = thread / 8;  // of rows
    const int upper = pair / 8 * 16 + pair % 8;
    const int64_t of_head = int64_t{batch} * p.heads + head;
    const float* from = p.sums + (of_head * p.queries.num_tiles() + tile) * kTileRows * kHeadDim +
                        (channels * kWarpgroupThreads + pair / 8 * kWarpThreads + pair % 8 * 4) * 4;
    const TilePlace at = p.queries.place(tile);
    const float* mean = p.means.rows == nullptr
                            ? nullptr
                            : p.means.rows +
                                  (of_head * p.queries.grid.num_tiles() + tile) * kHeadDim +
                                  channels * kChunkElements;
    const float share = 1.f / static_cast<float>(popcount(p.queries.rows(at, batch)));
    VSA_UNROLL
    for (int half = 0; half < 2; ++half) {
      Channels x;
      VSA_UNROLL
      for (int c = 0; c < kChunkElements; ++c) {
        x.x[c] = p.scale * from[c / 2 * 4 + half * 2 + c % 2];
        if (mean != nullptr) x.x[c] = fma(load_global(mean + c), share, x.x[c]);
      }
      const int token = p.queries.token(at, upper + 8 * half);
      if (token >= 0)
        p.grad_q.store(batch, token, head, channels * kChunkElements, narrow<Element>(x));
    }
  }
};

}  // namespace vsa
