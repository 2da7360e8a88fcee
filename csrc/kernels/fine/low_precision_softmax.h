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
#pragma once
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

  // scale: of each row's scores in this tile, base 2. The output so far must be given to `rescale`
  // before weights enter it. Scores are used up.
  VSA_DEVICE void weigh(Codes& codes, Fragment<64, int>& scores, const RowValues& scale) {
    RowValues slope, offset;
    find_maximum(scores, scale);
    find_line(slope, offset, scale);
    if_any_row(
        slope, [](float x) { return x > kSteep && x < kSteepest; },
        [&] { flatten(scores, slope, offset); });
    // The integer s is read as kNearestInteger + s, which costs an addition and no conversion.
    zip(offset, slope, [](float x, float by) { return fma(-kNearestInteger, by, x); });
    VSA_EACH_LANE(t) {
      const auto& x = lane(scores, t);
      const auto& by = lane(slope, t);
      const auto& start = lane(offset, t);
      auto& pair = lane(codes, t);
      VSA_UNROLL
      for (int p = 0; p < 16; ++p)
        pair[p] = line_codes(fma(biased_float(x[2 * p]), by[p & 1], start[p & 1]),
                             fma(biased_float(x[2 * p + 1]), by[p & 1], start[p & 1]));
    }
  }
  VSA_DEVICE void weigh(Codes& codes, Fragment<64, Fp16>& scores, const RowValues& scale) {
    RowValues slope, offset, steep;
    find_maximum(scores, scale);
    find_line(slope, offset, scale);
    steep = offset;
    zip(steep, slope, [](float start, float by) {
      const float far = max2(start - kTopCode, kTopCode - start);
      return by < kSteepest && (by > kSteepHalves || far > kFarHalves) ? 1 : 0;
    });
    if_any_row(steep, [](float x) { return x > 0; }, [&] { flatten(scores, slope, offset); });
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
    if_any_row(
        factor_, [](float factor) { return factor != 1.f; }, [&] { scale_rows(out, factor_); });
  }

 private:
  // Codes for a step of one of the integers from which on `weigh` would not be exact enough: it is
  // wrong by up to 3/4 of a step.
  static constexpr float kSteep = 2;
  // Of halves: the same, and how many codes the maximum may lie from zero, of which it is wrong by
  // up to 2^-11.
  static constexpr float kSteepHalves = 1024, kFarHalves = 256;
  // From here on products overflow and weights are NaN.
  static constexpr float kSteepest = 0x1p105f;

  template <class T>
  VSA_DEVICE void find_maximum(const Fragment<64, T>& scores, const RowValues& scale) {
    RowValues top, growth;
    find_largest(top, scores);
    zip(top, scale, [](float most, float by) { return most * by; });
    growth = top;
    zip(growth, max_, [](float now, float seen) { return now - seen; });
    fill(factor_, 1.f);
    // Lanes of a row tell each other only where one of them has found more than the row has seen.
    if_any_row(
        growth, [](float g) { return g > 0; },
        [&] {
          zip(top, max_, max2);
          quad_reduce(top, max2);
          zip(factor_, max_, [](float, float seen) { return seen; });
          zip(factor_, top, [](float seen, float now) { return exp2_approx(seen - now); });
          zip(max_, top, [](float, float now) { return now; });
        });
  }
  // Codes are slope s + offset.
  VSA_DEVICE void find_line(RowValues& slope, RowValues& offset, const RowValues& scale) const {
    slope = scale;
    offset = scale;
    zip(slope, scale, [](float, float by) { return 8 * by; });
    zip(offset, max_, [](float, float seen) { return fma(-8, seen, kTopCode); });
  }

  VSA_DEVICE static void find_largest(RowValues& top, const Fragment<64, int>& scores) {
    VSA_EACH_LANE(t) {
      const auto& x = lane(scores, t);
      auto& row = lane(top, t);
      VSA_UNROLL
      for (int half = 0; half < 2; ++half) {
        int most = x[2 * half], other = x[2 * half + 4];
        most = max3(most, x[2 * half + 1], x[2 * half + 8]);
        other = max3(other, x[2 * half + 5], x[2 * half + 12]);
        most = max3(most, x[2 * half + 9], x[2 * half + 16]);
        other = max3(other, x[2 * half + 13], x[2 * half + 20]);
        most = max3(most, x[2 * half + 17], x[2 * half + 24]);
        other = max3(other, x[2 * half + 21], x[2 * half + 28]);
        row[half] =
            static_cast<float>(max3(most, other, max3(x[2 * half + 25], x[2 * half + 29], most)));
      }
    }
  }

  VSA_DEVICE static void find_largest(RowValues& top, const Fragment<64, Fp16>& scores) {
    VSA_EACH_LANE(t) {
      const auto& x = lane(scores, t);
      auto& row = lane(top, t);
      VSA_UNROLL
      for (int half = 0; half < 2; ++half) {
        uint32_t most = x[half];
        VSA_UNROLL
        for (int p = half + 2; p < 16; p += 2) most = max_halves(most, x[p]);
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
        const float most = nearest(8 * seen[half] * reciprocal_approx(by[half]));
        VSA_UNROLL
        for (int i = 2 * half; i < 32; i += 4) {
          VSA_UNROLL
          for (int j = i; j < i + 2; ++j) {
            const float below = max2((static_cast<float>(x[j]) - most) * by[half], -kTopCode);
            x[j] = static_cast<int>(nearest(below));
          }
        }
        by[half] = 1;
        start[half] = kTopCode;
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
  // For numbers up to 2^22; larger ones stay near what they are.
  VSA_DEVICE static float nearest(float x) { return (x + kNearestInteger) - kNearestInteger; }

  RowValues max_, factor_;
};

}  // namespace vsa
