// SPDX-License-Identifier: Apache-2.0
// Online softmax of scores that are integers or halves, one tile at a time, whose weights are e4m3.
//
//   weight = e4m3 with the code round(8 (scale s - m) + kTopCode),   m: the row's largest scale s
//
// e4m3 numbers are about 2^(code / 8 - 7): their mantissa is linear, which makes weights too large
// by 1 to 1.061, on average by 1.041. The row's maximum stands at 1.75 x 2^7, where the factor is
// that average, so that the log-sum-exp has no bias. No exponential is computed. Sums of weights
// come out of the product with the values (tile/quantised_tile.h).
//
// Weights are relative to the largest score that the row has seen. NaN, as the scale of a row or
// tile, makes every weight NaN.
//
// All that is rare stands behind one vote of the warp: a row whose maximum grows, or whose scores
// are so steep that codes are computed in another way.
#pragma once
#include <cmath>

#include "prim/warp.h"
#include "tile/quantised_tile.h"

namespace vsa {

constexpr float kTopCode = 118, kTopWeight = 224;  // of a row's maximum, and what it stands for

class LowPrecisionSoftmax {
 public:
  // Of a lane, for 32 accumulator registers: pair p has the codes of registers 2 p and 2 p + 1,
  // each in the low byte of 16 bits. An operand of twice the columns has as many registers.
  using Codes = Operand8<2 * kTileRows>;

  VSA_DEVICE void reset() { fill(max_, -INFINITY); }
  VSA_DEVICE const RowValues& max() const { return max_; }
  // What the output so far must be multiplied by before weights of the last tile enter it.
  VSA_DEVICE RowValues factor() const {
    RowValues values = max_;
    fill(values, 1.f);
    if_warp(rare_, [&] { zip(values, factor_, [](float, float factor) { return factor; }); });
    return values;
  }

  // scale: of each row's scores in this tile, base 2. Scores are used up.
  VSA_DEVICE void weigh(Codes& codes, Fragment<64, int>& scores, const RowValues& scale) {
    RowValues top, slope, offset;
    // The integer s becomes the bits of the float kNearestInteger + s, by an addition and without a
    // conversion. The larger integer has the larger bits.
    VSA_EACH_LANE(t) {
      auto& x = lane(scores, t);
      VSA_UNROLL
      for (int i = 0; i < 32; ++i) x[i] = float_bits(biased_float(x[i]));
    }
    find_line(top, slope, offset, scale, scores, kCodeUnit);
    rare_ = any_row(top, max_, slope, [](float now, float seen, float by) {
      return (now > seen) | !(by <= kSteep * kCodeUnit);
    });
    if_warp(rare_, [&] {
      raise_maximum(top, offset, kCodeUnit);
      flatten(scores, slope, offset);
    });
    zip(offset, slope, [](float x, float by) { return fma(-kNearestInteger, by, x); });
    VSA_EACH_LANE(t) {
      const auto& x = lane(scores, t);
      const auto& by = lane(slope, t);
      const auto& start = lane(offset, t);
      auto& pair = lane(codes, t);
      VSA_UNROLL
      for (int p = 0; p < 16; ++p)
        pair[p] = line_codes(fma(float_of(x[2 * p]), by[p & 1], start[p & 1]),
                             fma(float_of(x[2 * p + 1]), by[p & 1], start[p & 1]));
    }
  }
  VSA_DEVICE void weigh(Codes& codes, Fragment<64, Fp16>& scores, const RowValues& scale) {
    RowValues top, slope, offset;
    find_line(top, slope, offset, scale, scores, 1);
    rare_ = any_row(top, max_, slope, [](float now, float seen, float by) {
      return (now > seen) | is_far(seen) | !(by <= kSteepHalves);
    });
    if_warp(rare_, [&] {
      raise_maximum(top, offset, 1);
      flatten(scores, slope, offset);
    });
    VSA_EACH_LANE(t) {
      const auto& x = lane(scores, t);
      const auto& by = lane(slope, t);
      const auto& start = lane(offset, t);
      auto& pair = lane(codes, t);
      const uint32_t factor[2] = {pack<Fp16>(by[0], by[0]), pack<Fp16>(by[1], by[1])};
      const uint32_t first[2] = {pack<Fp16>(start[0], start[0]), pack<Fp16>(start[1], start[1])};
      VSA_UNROLL
      for (int p = 0; p < 16; ++p) pair[p] = line_codes(x[p], factor[p & 1], first[p & 1]);
    }
  }

  template <int N>
  VSA_DEVICE void rescale(Fragment<N>& out) const {
    if_warp(rare_, [&] { scale_rows(out, factor_); });
  }

 private:
  // Codes for a step of one of the integers from which on `weigh` would not be exact enough: it is
  // wrong by up to 3/4 of a step.
  static constexpr float kSteep = 2;
  // Of halves: the same, and how far the maximum may lie from zero, of which it is wrong by up to
  // 2^-11.
  static constexpr float kSteepHalves = 1024, kFar = 32;
  VSA_DEVICE static bool is_far(float maximum) { return std::fabs(maximum) > kFar; }
  // From here on products overflow: weights are NaN.
  static constexpr float kSteepest = 0x1p105f;

  // top: the largest scores of a lane; codes are (slope s + offset) / unit.
  template <class T>
  VSA_DEVICE void find_line(RowValues& top,
                            RowValues& slope,
                            RowValues& offset,
                            const RowValues& scale,
                            const Fragment<64, T>& scores,
                            float unit) {
    find_largest(top, scores);
    zip(top, scale, [](float most, float by) { return most * by; });
    slope = scale;
    zip(slope, scale, [=](float, float by) { return 8 * unit * by; });
    offset = max_;
    find_offset(offset, unit);
  }
  VSA_DEVICE void find_offset(RowValues& offset, float unit) const {
    zip(offset, max_, [=](float, float seen) { return fma(-8 * unit, seen, kTopCode * unit); });
  }
  // Lanes of a row tell each other what they have found.
  VSA_DEVICE void raise_maximum(RowValues& top, RowValues& offset, float unit) {
    zip(top, max_, max2);
    quad_reduce(top, max2);
    zip(factor_, max_, [](float, float seen) { return seen; });
    zip(factor_, top, [](float seen, float now) { return exp2_approx(seen - now); });
    zip(max_, top, [](float, float now) { return now; });
    find_offset(offset, unit);
  }

  // Of integers as the floats that they have become.
  VSA_DEVICE static void find_largest(RowValues& top, const Fragment<64, int>& scores) {
    VSA_EACH_LANE(t) {
      const auto& x = lane(scores, t);
      auto& row = lane(top, t);
      VSA_UNROLL
      for (int half = 0; half < 2; ++half) {
        int most = larger(x[2 * half], x[2 * half + 1]);
        int other = larger(x[2 * half + 4], x[2 * half + 5]);
        VSA_UNROLL
        for (int i = 2 * half + 8; i < 32; i += 8) {
          most = max3(most, x[i], x[i + 1]);
          other = max3(other, x[i + 4], x[i + 5]);
        }
        row[half] = float_of(larger(most, other)) - kNearestInteger;
      }
    }
  }
  VSA_DEVICE static int larger(int a, int b) { return a > b ? a : b; }

  VSA_DEVICE static void find_largest(RowValues& top, const Fragment<64, Fp16>& scores) {
    VSA_EACH_LANE(t) {
      const auto& x = lane(scores, t);
      auto& row = lane(top, t);
      VSA_UNROLL
      for (int half = 0; half < 2; ++half) {
        // In an order in which ptxas finds maxima of three.
        uint32_t most = max_halves(max_halves(x[half], x[half + 2]), x[half + 12]);
        const uint32_t other = max_halves(x[half + 4], x[half + 6]);
        const uint32_t third = max_halves(x[half + 8], x[half + 10]);
        most = max_halves(max_halves(most, other), max_halves(third, x[half + 14]));
        row[half] = max2(widen_low<Fp16>(most), widen_high<Fp16>(most));
      }
    }
  }

  // Where the step of an integer is so large that next to the row's maximum everything is nothing:
  // scores become codes, relative to that maximum.
  VSA_DEVICE void flatten(Fragment<64, int>& scores, RowValues& slope, RowValues& offset) const {
    VSA_EACH_LANE(t) {
      auto& x = lane(scores, t);
      auto& by = lane(slope, t);
      auto& start = lane(offset, t);
      const auto& seen = lane(max_, t);
      VSA_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float step = by[half] / kCodeUnit;
        if (!(step < kSteepest)) start[half] = NAN;
        if (!(step > kSteep && step < kSteepest)) continue;
        // For numbers up to 2^22 the nearest integer; larger ones stay near what they are.
        const float most = fma(8 * seen[half], reciprocal_approx(step), kNearestInteger);
        VSA_UNROLL
        for (int i = 2 * half; i < 32; i += 4) {
          VSA_UNROLL
          for (int j = i; j < i + 2; ++j) {
            const float below = fma(float_of(x[j]) - most, step, kNearestInteger);
            x[j] = float_bits(max2(below, kNearestInteger - kTopCode));
          }
        }
        by[half] = kCodeUnit;
        start[half] = kTopCode * kCodeUnit;
      }
    }
  }
  VSA_DEVICE void flatten(Fragment<64, Fp16>& scores, RowValues& slope, RowValues& offset) const {
    VSA_EACH_LANE(t) {
      auto& x = lane(scores, t);
      auto& by = lane(slope, t);
      auto& start = lane(offset, t);
      const auto& seen = lane(max_, t);
      VSA_UNROLL
      for (int half = 0; half < 2; ++half) {
        if (!(by[half] < kSteepest)) start[half] = NAN;
        if (!((by[half] > kSteepHalves || is_far(seen[half])) && by[half] < kSteepest)) continue;
        const float exact = 8 * seen[half] * reciprocal_approx(by[half]);
        const float most = widen_low<Fp16>(pack<Fp16>(exact, exact));
        const auto below = [&](float score) {
          return max2((score - most) * by[half], -2 * kTopCode);
        };
        VSA_UNROLL
        for (int p = half; p < 16; p += 2)
          x[p] = pack<Fp16>(below(widen_low<Fp16>(x[p])), below(widen_high<Fp16>(x[p])));
        by[half] = 1;
        start[half] = kTopCode;
      }
    }
  }

  RowValues max_;
  WarpFlag rare_;     // of the last tile
  RowValues factor_;  // of the last rare tile
};

}  // namespace vsa
