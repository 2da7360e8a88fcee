// SPDX-License-Identifier: Apache-2.0
// Before the tail's kernels: the means of keys and values as the 16 bits that tensor cores take,
// and the logarithms of the tiles' sizes. A lane has two numbers of both, and maybe one size.
#pragma once
#include "kernels/tail/tail_keys.h"

namespace vsa {

struct RoundMeansParams {
  const float *k_means, *v_means;  // [batch, kv_heads, tiles, head_dim]
  uint32_t *k, *v;                 // pairs of the same
  int64_t pairs;
  float* bias;  // [chunks, 64]
  Grid keys;

  VSA_HD int padded() const { return ceil_div(keys.num_tiles(), kTileRows) * kTileRows; }
};

template <class Element>
struct RoundMeans {
  VSA_DEVICE static void run(const RoundMeansParams& p, int64_t lane) {
    if (lane < p.pairs) {
      p.k[lane] =
          pack<Element>(load_global(p.k_means + 2 * lane), load_global(p.k_means + 2 * lane + 1));
      p.v[lane] =
          pack<Element>(load_global(p.v_means + 2 * lane), load_global(p.v_means + 2 * lane + 1));
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
