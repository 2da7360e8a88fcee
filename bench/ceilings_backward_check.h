// SPDX-License-Identifier: Apache-2.0
// Whether the loops of a backward compute what they are timed for: the same in double precision,
// from an image of each block's shared memory.
#pragma once
#include "ceilings_check.h"
#include "ceilings_one_pass.h"
#include "ceilings_two_passes.h"

namespace vsa::ceilings {

// Adds what a pair of tiles gives to the gradients of its keys, values and queries.
template <int D>
void add_pair(const Matrix& k,
              const Matrix& v,
              const Matrix& q,
              const Matrix& grad_out,
              const float* lse,
              const float* delta,
              double scale,
              Matrix& grad_k,
              Matrix& grad_v,
              Matrix& grad_q) {
  for (int i = 0; i < kTileRows; ++i)
    for (int j = 0; j < kTileRows; ++j) {
      double score = 0, grad_weight = 0;
      for (int c = 0; c < D; ++c) {
        score += k[i * D + c] * q[j * D + c];
        grad_weight += v[i * D + c] * grad_out[j * D + c];
      }
      const double weight = std::exp2(score * scale - lse[j]);
      const double grad_score = weight * (grad_weight - delta[j]);
      for (int c = 0; c < D; ++c) {
        grad_v[i * D + c] += weight * grad_out[j * D + c];
        grad_k[i * D + c] += grad_score * q[j * D + c];
        grad_q[j * D + c] += grad_score * k[i * D + c];
      }
    }
}

// The pass over keys, and one pass: both leave dK and dV of each consumer.
template <class Loop>
double compare_keys(const typename Loop::Shared* images,
                    const BackwardParams& params,
                    const std::vector<float>& found,
                    const std::vector<float>& added,
                    Sum to) {
  constexpr int D = Loop::D, kBlocks = 2, kNumbers = kTileRows * D;
  double worst = 0;
  std::vector<Matrix> grad_q(kBlocks * params.steps, Matrix(kNumbers));
  for (int b = 0; b < kBlocks; ++b) {
    const auto& s = images[b];
    for (int w = 0; w < Loop::kConsumers; ++w) {
      Matrix grad_k(kNumbers), grad_v(kNumbers);
      const float* results = found.data() + (size_t{1} * b * Loop::kResults + 2 * w) * kNumbers;
      for (int n = 0; n < params.steps; ++n) {
        const int i = n % Loop::kStages;
        add_pair<D>(read(s.k[w]), read(s.v[w]), read(s.q[i]), read(s.grad_out[i]), s.lse[i],
                    s.delta[i], params.scale, grad_k, grad_v,
                    grad_q[b / Loop::kCluster * params.steps + n]);
      }
      worst = larger(worst, error_of(grad_k, results));
      worst = larger(worst, error_of(grad_v, results + kNumbers));
    }
  }
  if (to == Sum::Nothing) return worst;
  for (int n = 0; n < kBlocks / Loop::kCluster * params.steps; ++n) {
    std::vector<float> tile(kNumbers);
    for (int half = 0; half < D / 64; ++half)
      for (int t = 0; t < kWarpgroupThreads; ++t)
        for (int i = 0; i < 32; ++i) {
          const size_t at = (size_t{1} * n * (D / 64) + half) * kHalf;
          const int column = half * 64 + accumulator_column(t, i);
          float& x = tile[accumulator_row(t, i) * D + column];
          if (to == Sum::Pairs) {
            const size_t pair = (i / 2 / 4 * kWarpgroupThreads + t) * 4 + i / 2 % 4;
            uint32_t both;
            std::memcpy(&both, reinterpret_cast<const char*>(added.data()) + at * 2 + pair * 4, 4);
            const uint32_t word = i % 2 == 0 ? both << 16 : both & 0xffff0000;
            std::memcpy(&x, &word, sizeof x);
          } else {
            x = added[at + (i / 4 * kWarpgroupThreads + t) * 4 + i % 4];
          }
        }
    worst = larger(worst, error_of(grad_q[n], tile.data()));
  }
  return worst;
}

// The pass over queries: statistics and results are of a consumer's query tile.
template <class Loop>
double compare_queries(const typename Loop::Shared* images,
                       const BackwardParams& params,
                       const std::vector<float>& found) {
  constexpr int D = Loop::D, kBlocks = 2, kNumbers = kTileRows * D;
  double worst = 0;
  for (int b = 0; b < kBlocks; ++b)
    for (int w = 0; w < Loop::kConsumers; ++w) {
      const auto& s = images[b];
      Matrix grad_q(kNumbers), grad_k(kNumbers), grad_v(kNumbers);
      for (int n = 0; n < params.steps; ++n) {
        const int i = n % Loop::kStages;
        add_pair<D>(read(s.k[i]), read(s.v[i]), read(s.q[w]), read(s.grad_out[w]), s.lse[w],
                    s.delta[w], params.scale, grad_k, grad_v, grad_q);
      }
      const float* results = found.data() + (size_t{1} * b * Loop::kResults + w) * kNumbers;
      worst = larger(worst, error_of(grad_q, results));
    }
  return worst;
}

}  // namespace vsa::ceilings
