// SPDX-License-Identifier: Apache-2.0
// Online softmax in base 2, one tile of scores at a time.
//
//   weights = 2^(scale s - scale m),  sum += row sums of weights,  out = weights V + out
//
// m is the largest score that each row has seen, so the weight of a row's largest score is exactly
// 1 and rounds to itself. Letting m lag behind would save most rescaling and 2 % of the time, at
// half as much error again (bench/log/exactness.md). Sums are kept per lane until the end.
#pragma once
#include <cfloat>

#include "tile/fragment.h"

namespace vsa {

// Keys that are no tokens get no weight. The mask is the same for the whole warpgroup, so a tile
// that is whole costs one branch.
VSA_DEVICE void mask_columns(Fragment<64>& scores, uint64_t rows) {
  if (rows != ~uint64_t{0}) fill_columns(scores, rows, -INFINITY);
}

class Softmax {
 public:
  static constexpr float kLog2e = 1.44269504f;

  VSA_DEVICE void reset() {
    fill(max_, -INFINITY);
    fill(sum_, 0.f);
  }
  // Goes on after what an output and its log-sum-exp, in base 2, stand for: one key of that score,
  // or none. Its place is finite even then, since scores that are all masked are measured by it.
  VSA_DEVICE void resume(const RowValues& lse) {
    VSA_EACH_LANE(t) {
      const auto& x = lane(lse, t);
      auto& top = lane(max_, t);
      auto& sum = lane(sum_, t);
      VSA_UNROLL
      for (int half = 0; half < 2; ++half) {
        top[half] = max2(x[half], -FLT_MAX);
        sum[half] = t % 4 == 0 && x[half] != -INFINITY ? 1.f : 0.f;  // once for each row
      }
    }
  }

  // Scores become weights; the output so far must be given to `rescale` before weights enter it.
  template <int N>
  VSA_DEVICE void weigh(Fragment<N>& scores, float scale) {
    RowValues top = max_, growth, offset;
    fold_rows(top, scores, max2);
    growth = top;
    zip(growth, max_, [](float now, float seen) { return now - seen; });
    fill(factor_, 1.f);
    // Lanes of a row tell each other only where one of them has found more than the row has seen.
    if_any_row(
        growth, [](float g) { return g > 0; },
        [&] {
          quad_reduce(top, max2);
          zip(factor_, max_, [](float, float seen) { return seen; });
          zip(factor_, top,
              [=](float seen, float now) { return exp2_approx((seen - now) * scale); });
          zip(sum_, factor_, [](float sum, float factor) { return sum * factor; });
          zip(max_, top, [](float, float now) { return now; });
        });
    zip(offset, max_, [=](float, float seen) { return -seen * scale; });
    map_rows(scores, offset, [=](float x, float o) { return exp2_approx(fma(x, scale, o)); });
    fold_rows(sum_, scores, [](float sum, float weight) { return sum + weight; });
  }

  template <int D>
  VSA_DEVICE void rescale(Fragment<D>& out) const {
    if_any_row(
        factor_, [](float factor) { return factor != 1.f; }, [&] { scale_rows(out, factor_); });
  }

  // out /= sum, zeros where nothing was attended. Afterwards `lse` has its value, -inf there.
  template <int D>
  VSA_DEVICE void finish(Fragment<D>& out, RowValues& lse, float scale) {
    quad_reduce(sum_, [](float a, float b) { return a + b; });
    zip(factor_, sum_, [](float, float sum) { return sum > 0 ? 1 / sum : 0; });
    scale_rows(out, factor_);
    zip(lse, max_, [=](float, float seen) { return seen * scale; });
    zip(lse, sum_, [](float top, float sum) { return (top + log2_approx(sum)) * kLn2; });
  }

 private:
  static constexpr float kLn2 = 0.69314718f;

  RowValues max_, sum_, factor_;
};

}  // namespace vsa
