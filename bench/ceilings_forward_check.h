// SPDX-License-Identifier: Apache-2.0
// Whether the loops of a forward compute what they are timed for: the same in double precision,
// from an image of each block's shared memory.
#pragma once
#include "ceilings_check.h"
#include "ceilings_loops.h"

namespace vsa::ceilings {

// The largest error of out over its root mean square, or of a log-sum-exp.
template <class Loop>
double compare_forward(const typename Loop::Shared* images,
                       const LoopParams& params,
                       int blocks,
                       const std::vector<float>& found) {
  constexpr int D = Loop::D, kRows = Loop::kColumns;
  double worst = 0;
  for (int b = 0; b < blocks; ++b)
    for (int w = 0; w < Loop::kConsumers; ++w) {
      const auto& s = images[b];
      const Matrix q = read(s.q[w]);
      Matrix out(kTileRows * D), sums(kTileRows);
      for (int n = 0; n < params.steps; ++n) {
        const Matrix k = read(s.k[n % Loop::kKeyStages], kRows, D);
        for (int j = 0; j < kRows; ++j) {
          const Matrix v = read(s.v[n % Loop::kValueStages][j / kTileRows]);
          for (int i = 0; i < kTileRows; ++i) {
            double score = 0;
            for (int c = 0; c < D; ++c) score += q[i * D + c] * k[j * D + c];
            const double weight = std::exp2(score * params.scale);
            sums[i] += weight;
            for (int c = 0; c < D; ++c) out[i * D + c] += weight * v[j % kTileRows * D + c];
          }
        }
      }
      for (int i = 0; i < kTileRows; ++i)
        for (int c = 0; c < D; ++c) out[i * D + c] /= sums[i];
      const float* results = found.data() + (size_t{1} * b * Loop::kConsumers + w) * Loop::kResults;
      worst = larger(worst, error_of(out, results));
      for (int i = 0; i < kTileRows; ++i)
        worst = larger(worst, std::abs(std::log(sums[i]) - results[kTileRows * D + i]));
    }
  return worst;
}

}  // namespace vsa::ceilings
