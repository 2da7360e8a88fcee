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

#include "prim/warp.h"
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
    weigh_together(scale, scores);
  }
  // The same for the scores of several tiles.
  template <class... Scores>
  VSA_DEVICE void weigh_together(float scale, Scores&... scores) {
    raise(scale, scores...);
    (weigh_raised(scores, scale), ...);
  }
  // In two steps: first the maximum of all tiles, then the weights of each.
  template <class... Scores>
  VSA_DEVICE void raise(float scale, Scores&... scores) {
    RowValues top = max_, growth;
#ifdef VSA_MAX3
    (fold_bits(top, scores), ...);
    fill(factor_, 1.f);
    const WarpFlag rare = any_row(top, max_, max_, [](float now, float seen, float) {
      return (now > seen) | (seen < 0);
    });
    if_warp(rare, [&] {
      if_any_row(
          max_, [](float seen) { return seen < 0; },
          [&] {
            top = max_;
            (fold_rows(top, scores, max2), ...);
          });
      raise_to(top, scale);
    });
#else
    (fold_rows(top, scores, max2), ...);
    growth = top;
    zip(growth, max_, [](float now, float seen) { return now - seen; });
    fill(factor_, 1.f);
    // Lanes of a row tell each other only where one of them has found more than the row has seen.
    if_any_row(growth, [](float g) { return g > 0; }, [&] { raise_to(top, scale); });
#endif
  }
  // Likewise, rounded at once.
  template <class Element>
  VSA_DEVICE void weigh_into(Operand<64>& weights, const Fragment<64>& scores, float scale) {
    VSA_EACH_LANE(t) {
      const auto& x = lane(scores, t);
      const auto& top = lane(max_, t);
      auto& sum = lane(sum_, t);
      auto& pairs = lane(weights, t);
      float other[2] = {0, 0};
      VSA_UNROLL
      for (int r = 0; r < 16; ++r) {
        const float offset = -top[r & 1] * scale;
        const float a = exp2_approx(fma(x[2 * r], scale, offset));
        const float b = exp2_approx(fma(x[2 * r + 1], scale, offset));
        sum[r & 1] += a;
        other[r & 1] += b;
        pairs[r] = pack<Element>(a, b);
      }
      sum[0] += other[0];
      sum[1] += other[1];
    }
  }
  template <int N>
  VSA_DEVICE void weigh_raised(Fragment<N>& scores, float scale) {
    RowValues offset;
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

  VSA_DEVICE void raise_to(RowValues& top, float scale) {
    quad_reduce(top, max2);
    zip(factor_, max_, [](float, float seen) { return seen; });
    zip(factor_, top, [=](float seen, float now) { return exp2_approx((seen - now) * scale); });
    zip(sum_, factor_, [](float sum, float factor) { return sum * factor; });
    zip(max_, top, [](float, float now) { return now; });
  }

#ifdef VSA_MAX3
  // The largest by their bits as integers: what is right where any of them is at least 0.
  VSA_DEVICE static void fold_bits(RowValues& top, const Fragment<64>& scores) {
    VSA_EACH_LANE(t) {
      const auto& x = lane(scores, t);
      auto& row = lane(top, t);
      VSA_UNROLL
      for (int half = 0; half < 2; ++half) {
        const auto at = [&](int i) { return float_bits(x[2 * half + i]); };
        int most = max3(float_bits(row[half]), at(0), at(1));
        int other = max3(at(4), at(5), at(8));
        other = max3(other, at(9), at(12));
        other = max3(other, at(13), at(16));
        most = max3(most, at(17), at(20));
        other = max3(other, at(21), at(24));
        most = max3(most, at(25), at(28));
        row[half] = float_of(max3(most, other, at(29)));
      }
    }
  }
#endif

  RowValues max_, sum_, factor_;
};

}  // namespace vsa
