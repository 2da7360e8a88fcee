// SPDX-License-Identifier: Apache-2.0
// The softmax of one row of scores, by one warp: the weights of the coarse attention, which may be
// written where the scores are.
#pragma once
#include "prim/warp.h"

namespace vsa {

class SoftmaxRow {
 public:
  // greatest: of the scores that are numbers. A score that is none has a weight that is none.
  VSA_DEVICE static void run(const float* scores, float* weights, int columns, float greatest) {
    const auto weight = [=](float score) { return exp2_approx((score - greatest) * kLog2e); };
    PerLane<float> own;
    each_lane([&](int lane) { own[lane] = 0; });
    each_score(scores, columns,
               [&](int lane, int, float score) { own[lane] += max2(weight(score), 0.f); });
    // In whole numbers, whose sum does not depend on the order of adding.
    const uint64_t total = sum([&](int lane) { return static_cast<uint64_t>(own[lane] * kOne); });
    const float share = kOne / static_cast<float>(total);
    each_score(scores, columns,
               [&](int, int column, float score) { weights[column] = weight(score) * share; });
  }

 private:
  static constexpr float kLog2e = 1.44269504f;
  static constexpr float kOne = 4294967296.f;  // 2^32
  static constexpr int kTogether = 4;  // scores of a lane whose loads are in flight together

  // fn(lane, column, score)
  template <class Fn>
  VSA_DEVICE static void each_score(const float* scores, int columns, Fn fn) {
    for (int first = 0; first < columns; first += kTogether * kWarpThreads)
      each_lane([&](int lane) {
        float score[kTogether];
        VSA_UNROLL
        for (int i = 0; i < kTogether; ++i) {
          const int column = first + i * kWarpThreads + lane;
          score[i] = column < columns ? scores[column] : -INFINITY;
        }
        VSA_UNROLL
        for (int i = 0; i < kTogether; ++i) {
          const int column = first + i * kWarpThreads + lane;
          if (column < columns) fn(lane, column, score[i]);
        }
      });
  }
};

}  // namespace vsa
