// SPDX-License-Identifier: Apache-2.0
// The softmax of one row of scores, by one warp: the weights of the coarse attention, which may be
// written where the scores are.
#pragma once
#include "kernels/select/score_row.h"

namespace vsa {

// What a row without a mask has in place of one.
struct AllColumns {
  int columns;

  VSA_DEVICE static bool has_in_run(int) { return true; }
  template <class Fn>
  VSA_DEVICE void each_run(Fn fn) const {
    fn(Run{0, columns});
  }
};

class SoftmaxRow {
 public:
  // greatest: of the scores that are numbers. A score that is none has a weight that is none.
  // allowed: AllColumns, AllowedRuns or AllowedTiles; other columns are not read and have no
  // weight.
  template <class Allowed>
  VSA_DEVICE static void run(const float* scores,
                             float* weights,
                             float greatest,
                             const Allowed& allowed) {
    constexpr bool kAll = std::is_same_v<Allowed, AllColumns>;
    const auto weight = [=](float score) { return exp2_approx((score - greatest) * kLog2e); };
    PerLane<float> own;
    each_lane([&](int lane) { own[lane] = 0; });
    each_score(scores, allowed, [&](int lane, int, float score, bool there) {
      if (there) own[lane] += max2(weight(score), 0.f);
    });
    // In whole numbers, whose sum does not depend on the order of adding.
    const uint64_t total = sum([&](int lane) { return static_cast<uint64_t>(own[lane] * kOne); });
    float share;
    if constexpr (kAll)
      share = kOne / static_cast<float>(total);
    else  // no call, around which registers would be spilled
      share = kOne * reciprocal_approx(static_cast<float>(total));
    each_score(scores, allowed, [&](int, int column, float score, bool there) {
      weights[column] = there ? weight(score) * share : 0;
    });
    if constexpr (!kAll)
      allowed.each_gap([&](Run gap) {
        each_lane([&](int lane) {
          for (int column = gap.first + lane; column < gap.after; column += kWarpThreads)
            weights[column] = 0;
        });
      });
  }

  // The greatest score of columns that are allowed. One that is no number is passed over.
  template <class Allowed>
  VSA_DEVICE static float greatest_of(const float* scores, const Allowed& allowed) {
    PerLane<float> own;
    each_lane([&](int lane) { own[lane] = -INFINITY; });
    each_score(scores, allowed, [&](int lane, int, float score, bool there) {
      if (there) own[lane] = max2(own[lane], score);
    });
    return of_order(greatest([&](int lane) { return order_of(own[lane]); }));
  }

 private:
  static constexpr float kLog2e = 1.44269504f;
  static constexpr float kOne = 4294967296.f;  // 2^32
  static constexpr int kTogether = 4;  // scores of a lane whose loads are in flight together

  // fn(lane, column, score, whether it is allowed) for each column of a run. Lanes have the columns
  // that they have without a mask, in the same order.
  template <class Allowed, class Fn>
  VSA_DEVICE static void each_score(const float* scores, const Allowed& allowed, Fn fn) {
    allowed.each_run([&](Run run) {
      for (int first = run.first / kWarpThreads * kWarpThreads; first < run.after;
           first += kTogether * kWarpThreads)
        each_lane([&](int lane) {
          float score[kTogether];
          bool inside[kTogether], there[kTogether];
          VSA_UNROLL
          for (int i = 0; i < kTogether; ++i) {
            const int column = first + i * kWarpThreads + lane;
            inside[i] = run.holds(column);
            there[i] = inside[i] && allowed.has_in_run(column);
            score[i] = there[i] ? scores[column] : -INFINITY;
          }
          VSA_UNROLL
          for (int i = 0; i < kTogether; ++i)
            if (inside[i]) fn(lane, first + i * kWarpThreads + lane, score[i], there[i]);
        });
    });
  }
};

}  // namespace vsa
