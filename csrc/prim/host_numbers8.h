// SPDX-License-Identifier: Apache-2.0
// 8-bit numbers on a CPU that knows none, and how the tensor cores add their products up.
#pragma once
#include <algorithm>
#include <climits>
#include <cmath>

#include "prim/host_numbers.h"
#include "prim/operand8.h"

namespace vsa {
namespace host {

constexpr uint8_t kNanE4m3 = 0x7f;      // what the GPU rounds a NaN to
constexpr uint8_t kLargestE4m3 = 0x7e;  // 448

inline float widen(E4m3, uint8_t code) {
  const uint32_t magnitude = code & 0x7fu, sign = uint32_t{code & 0x80u} << 24;
  // Exponent and mantissa move to their places; multiplying rebiases subnormal numbers as well.
  const float scaled = std::bit_cast<float>(magnitude << 20) * 0x1p120f;
  const uint32_t value = magnitude == kNanE4m3 ? 0x7fc00000u : std::bit_cast<uint32_t>(scaled);
  return std::bit_cast<float>(value | sign);
}
inline int widen(S8, uint8_t byte) { return static_cast<int8_t>(byte); }

// Round to nearest even; what is larger than the largest number becomes that, infinity too.
inline uint8_t narrow(E4m3, float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const auto sign = static_cast<uint8_t>(bits >> 24 & 0x80);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return kNanE4m3;
  // Below 2^-6 numbers are multiples of 2^-9: adding 2^14 rounds to those.
  if (magnitude < 0x3c800000)
    return static_cast<uint8_t>(
        sign | (std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0x1p14f) - 0x46800000));
  const uint32_t rebiased = magnitude - (120u << 23);
  const uint32_t code = (rebiased + 0x7ffff + (rebiased >> 20 & 1)) >> 20;
  return static_cast<uint8_t>(sign | std::min<uint32_t>(code, kLargestE4m3));
}
// x + 1.5 x 2^23 has the nearest integer in its low bits.
inline uint8_t narrow(S8, float x) {
  return static_cast<uint8_t>(std::bit_cast<uint32_t>(x + kNearestInteger));
}

// Of a number of fp32, not zero. Inline even where tests compile quickly: the sum below spends its
// time here.
[[gnu::always_inline]] inline int exponent_of(float x) {
  return static_cast<int>(__builtin_bit_cast(uint32_t, x) >> 23 & 0xff) - 127;
}
[[gnu::always_inline]] inline int larger(int a, int b) { return a > b ? a : b; }
constexpr int kLeastExponentE4m3 = -6;  // of subnormal numbers too

// The sum of one step of products of e4m3 numbers and the accumulator, as it is before it leaves.
VSA_FAST inline float sum_fp8(const float* left, const float* right, float accumulator) {
  float terms[kReduction8];
  int most = accumulator == 0 ? INT_MIN : exponent_of(accumulator);
  for (int k = 0; k < kReduction8; ++k) {
    terms[k] = left[k] * right[k];
    const int exponent = larger(exponent_of(left[k]), kLeastExponentE4m3) +
                         larger(exponent_of(right[k]), kLeastExponentE4m3);
    most = larger(most, terms[k] == 0 ? INT_MIN : exponent);
  }
  const bool tiny = most <= kFp8SumBits - 126;  // next to nothing
  if (tiny || most > 100) {                     // else the sum is finite
    float all = accumulator;
    for (int k = 0; k < kReduction8; ++k) all += terms[k];
    if (tiny || !std::isfinite(all)) return all;
  }
  const auto power = [](int x) { return std::bit_cast<float>((x + 127) << 23); };
  const float per_unit = power(kFp8SumBits - most);  // multiplying by a power of two is exact
  int units = static_cast<int>(accumulator * per_unit);
  for (int k = 0; k < kReduction8; ++k) units += static_cast<int>(terms[k] * per_unit);
  return static_cast<float>(units) * power(most - kFp8SumBits);
}

// What of such a sum an accumulator holds.
inline float held_sum(float, float sum) {
  const uint32_t kept = ~uint32_t{0} << (23 - kFp8SumBits);
  return std::isfinite(sum) ? std::bit_cast<float>(std::bit_cast<uint32_t>(sum) & kept) : sum;
}
inline float held_sum(Fp16, float sum) { return widen(Fp16{}, narrow(Fp16{}, sum)); }

}  // namespace host

template <class Element>
uint32_t pack8(float a, float b, float c, float d) {
  return host::narrow(Element{}, a) | uint32_t{host::narrow(Element{}, b)} << 8 |
         uint32_t{host::narrow(Element{}, c)} << 16 | uint32_t{host::narrow(Element{}, d)} << 24;
}

inline void widen_e4m3(float (&x)[4], uint32_t fours) {
  for (int i = 0; i < 4; ++i) x[i] = host::widen(E4m3{}, static_cast<uint8_t>(fours >> 8 * i));
}

inline float biased_float(int x) { return static_cast<float>(x) + kNearestInteger; }

inline uint32_t line_codes(float lo, float hi) {
  const auto code = [](float x) -> uint32_t { return host::narrow(Fp16{}, x < 0 ? 0 : x); };
  return code(lo) | code(hi) << 16;
}

inline uint32_t low_bytes(uint32_t ab, uint32_t cd) {
  return (ab & 0xff) | (ab >> 8 & 0xff00) | (cd & 0xff) << 16 | (cd >> 16 & 0xff) << 24;
}

inline uint32_t fma_halves(uint32_t a, uint32_t b, uint32_t c) {
  const auto each = [&](int shift) -> uint32_t {
    const auto wide = [=](uint32_t x) {
      return static_cast<double>(host::widen(Fp16{}, static_cast<uint16_t>(x >> shift)));
    };
    return host::narrow(Fp16{}, static_cast<float>(wide(a) * wide(b) + wide(c)));
  };
  return each(0) | each(16) << 16;
}

inline uint32_t line_codes(uint32_t x, uint32_t slope, uint32_t offset) {
  const uint32_t y = fma_halves(x, slope, offset);
  const auto code = [=](int shift) -> uint32_t {
    const float half = host::widen(Fp16{}, static_cast<uint16_t>(y >> shift));
    return host::narrow(Fp16{}, (half < 0 ? 0 : half) + 1024);
  };
  return code(0) | code(16) << 16;
}

inline uint32_t max_halves(uint32_t a, uint32_t b) {
  const auto larger = [&](int shift) -> uint32_t {
    const auto x = static_cast<uint16_t>(a >> shift), y = static_cast<uint16_t>(b >> shift);
    return host::widen(Fp16{}, x) > host::widen(Fp16{}, y) ? x : y;
  };
  return larger(0) | larger(16) << 16;
}

inline int max3(int a, int b, int c) { return std::max(std::max(a, b), c); }

}  // namespace vsa
