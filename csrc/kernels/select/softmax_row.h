// SPDX-License-Identifier: Apache-2.0
// The softmax of one row of scores, by one warp: the weights of the coarse attention, which may be
// written where the scores are.
#pragma once
#include "prim/warp.h"

namespace vsa {

class SoftmaxRow {
 public:
  struct All {
    VSA_DEVICE bool operator()(int) const { return true; }
  };

  // greatest: of the scores that are numbers. A score that is none has a weight that is none.
  // allowed(column): others are not read and have no weight.
  template <class Allowed = All>
  VSA_DEVICE static void run(const float* scores,
                             float* weights,
                             int columns,
                             float greatest,
                             Allowed allowed = {}) {
    const auto weight = [=](float score) { return exp2_approx((score - greatest) * kLog2e); };
    PerLane<float> own;
    each_lane([&](int lane) { own[lane] = 0; });
    each_score(scores, columns, allowed,
               [&](int lane, int, float score) { own[lane] += max2(weight(score), 0.f); });
    // In whole numbers, whose sum does not depend on the order of adding.
    const uint64_t total = sum([&](int lane) { return static_cast<uint64_t>(own[lane] * kOne); });
    float share;
    if constexpr (std::is_same_v<Allowed, All>)
      share = kOne / static_cast<float>(total);
    else  // no call, around which registers would be spilled
      share = kOne * reciprocal_approx(static_cast<float>(total));
    each_score(scores, columns, allowed,
               [&](int, int column, float score) { weights[column] = weight(score) * share; });
    if constexpr (!std::is_same_v<Allowed, All>) clear_others(weights, columns, allowed);
  }

 private:
  static constexpr float kLog2e = 1.44269504f;
  static constexpr float kOne = 4294967296.f;  // 2^32
  static constexpr int kTogether = 4;  // scores of a lane whose loads are in flight together

  template <class Allowed>
  VSA_DEVICE static void clear_others(float* weights, int columns, Allowed allowed) {
    each_lane([&](int lane) {
      for (int column = lane; column < columns; column += kWarpThreads)
        if (!allowed(column)) weights[column] = 0;
    });
  }

  // fn(lane, column, score)
  template <class Allowed, class Fn>
  VSA_DEVICE static void each_score(const float* scores, int columns, Allowed allowed, Fn fn) {
    for (int first = 0; first < columns; first += kTogether * kWarpThreads)
      each_lane([&](int lane) {
        float score[kTogether];
        VSA_UNROLL
        for (int i = 0; i < kTogether; ++i) {
          const int column = first + i * kWarpThreads + lane;
          score[i] = column < columns && allowed(column) ? scores[column] : -INFINITY;
        }
        VSA_UNROLL
        for (int i = 0; i < kTogether; ++i) {
          const int column = first + i * kWarpThreads + lane;
          if (column < columns && allowed(column)) fn(lane, column, score[i]);
        }
      });
  }
};

}  // namespace vsa
