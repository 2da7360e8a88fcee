// SPDX-License-Identifier: Apache-2.0
// Before the tail's kernels: the means of keys and values as the 16 bits that tensor cores take,
// what that loses of the keys', and the logarithms of the tiles' sizes. A lane has two numbers of
// both, and maybe one size.
#pragma once
#include "kernels/tail/chunks.h"

namespace vsa {

struct RoundMeansParams {
  const float *k_means, *v_means;  // [batch, kv_heads, tiles, head_dim]
  uint32_t *k, *k_low, *v;         // pairs of the same
  int64_t pairs;
  float* bias;  // [chunks, 64]
  Grid keys;

  VSA_HD int padded() const { return ceil_div(keys.num_tiles(), kTileRows) * kTileRows; }
};

template <class Element>
struct RoundMeans {
  VSA_DEVICE static void run(const RoundMeansParams& p, int64_t lane) {
    if (lane < p.pairs) {
      const float* k = p.k_means + 2 * lane;
      const float* v = p.v_means + 2 * lane;
      const float first = load_global(k), second = load_global(k + 1);
      const uint32_t pair = pack<Element>(first, second);
      p.k[lane] = pair;
      p.k_low[lane] =
          pack<Element>(first - widen_low<Element>(pair), second - widen_high<Element>(pair));
      p.v[lane] = pack<Element>(load_global(v), load_global(v + 1));
    }
    if (lane < p.padded()) {
      const int tile = static_cast<int>(lane);
      p.bias[tile] = tile < p.keys.num_tiles()
                         ? log2_approx(static_cast<float>(popcount(p.keys.row_mask(tile))))
                         : -INFINITY;
    }
  }
};

}  // namespace vsa
