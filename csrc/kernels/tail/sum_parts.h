// SPDX-License-Identifier: Apache-2.0
// After the tail's pass over means: the sums of all splits, one after the other, become the
// gradients of the means. A lane has one number of both.
#pragma once
#include "prim/prim.h"

namespace vsa {

struct SumPartsParams {
  const float* parts;  // [splits, 2, numbers] sums of k, sums of v
  int splits;
  int64_t numbers;  // [batch, kv_heads, tiles, head_dim]
  float scale;      // of the sums of k
  float *grad_k, *grad_v;
  bool accumulate;  // adds to what is there

  VSA_DEVICE static void run(const SumPartsParams& p, int64_t lane) {
    float k = 0, v = 0;
    for (int split = 0; split < p.splits; ++split) {
      const float* part = p.parts + split * 2 * p.numbers + lane;
      k += load_global(part);
      v += load_global(part + p.numbers);
    }
    p.grad_k[lane] = (p.accumulate ? p.grad_k[lane] : 0) + k * p.scale;
    p.grad_v[lane] = (p.accumulate ? p.grad_v[lane] : 0) + v;
  }
};

}  // namespace vsa
