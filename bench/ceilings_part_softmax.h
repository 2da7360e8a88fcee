// SPDX-License-Identifier: Apache-2.0
// The softmax of kernels/fine/softmax.h in two parts: what a tile of scores makes of a row's
// maximum, and the exponentials of some of its columns.
#pragma once
#include "tile/fragment.h"

namespace vsa::ceilings {

class PartSoftmax {
 public:
  VSA_DEVICE void reset() {
    fill(max_, -INFINITY);
    fill(sum_, 0.f);
  }
  // The output so far must be given to `rescale` before weights of these scores enter it.
  template <int N>
  VSA_DEVICE void measure(const Fragment<N>& scores, float scale) {
    RowValues top = max_, growth;
    fold_rows(top, scores, max2);
    growth = top;
    zip(growth, max_, [](float now, float seen) { return now - seen; });
    fill(factor_, 1.f);
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
    zip(offset_, max_, [=](float, float seen) { return -seen * scale; });
  }
  // Weights of Count registers from First on, as pairs; they enter the sums. Scores stay as they
  // are: ptxas serialises products whose accumulators something else writes while others run.
  template <int First, int Count, int N>
  VSA_DEVICE void weigh_part(Operand<N>& weights, const Fragment<N>& scores, float scale) {
    float chains[4] = {};
    VSA_UNROLL
    for (int r = First / 2; r < (First + Count) / 2; ++r) {
      const float offset = offset_.x[r & 1];
      const float left = exp2_approx(fma(scores.x[2 * r], scale, offset));
      const float right = exp2_approx(fma(scores.x[2 * r + 1], scale, offset));
      chains[r & 3] += left;
      chains[r & 3] += right;
      weights.x[r] = pack<Bf16>(left, right);
    }
    sum_.x[0] += chains[0] + chains[2];
    sum_.x[1] += chains[1] + chains[3];
  }
  template <int D>
  VSA_DEVICE void rescale(Fragment<D>& out) const {
    if_any_row(
        factor_, [](float factor) { return factor != 1.f; }, [&] { scale_rows(out, factor_); });
  }
  template <int D>
  VSA_DEVICE void finish(Fragment<D>& out, RowValues& lse, float scale) {
    quad_reduce(sum_, [](float a, float b) { return a + b; });
    zip(factor_, sum_, [](float, float sum) { return 1 / sum; });
    scale_rows(out, factor_);
    zip(lse, max_, [=](float, float seen) { return seen * scale; });
    zip(lse, sum_, [](float top, float sum) { return (top + log2_approx(sum)) * 0.69314718f; });
  }

 private:
  RowValues max_, sum_, factor_, offset_;
};

}  // namespace vsa::ceilings
