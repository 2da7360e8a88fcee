// SPDX-License-Identifier: Apache-2.0
// 16-bit numbers on a CPU that knows none. Branchless, so that loops over them are vectorised.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "prim/operand.h"

// Where the emulator spends its time: optimised even where tests compile quickly, and for wide
// vectors where the CPU has them. Not AVX-512, nor FMA: every sum rounds as it does without.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VSA_FAST [[gnu::optimize(3), gnu::target_clones("avx2", "default")]]
#else
#define VSA_FAST
#endif

namespace vsa {
namespace host {

constexpr uint16_t kNan16 = 0x7fff;  // what the GPU rounds a NaN to, in both formats

inline float widen(Bf16, uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

inline float widen(Fp16, uint16_t bits) {
  const uint32_t magnitude = (bits & 0x7fffu) << 13;
  // The exponent's bias grows by 112; multiplying does that for subnormal numbers as well.
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t special = magnitude | 0x7f800000u;
  const uint32_t value = magnitude >= 0x7c00u << 13 ? special : std::bit_cast<uint32_t>(scaled);
  return std::bit_cast<float>(value | (bits & 0x8000u) << 16);
}

// Round to nearest even.
inline uint16_t narrow(Bf16, float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return x != x ? kNan16 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint16_t narrow(Fp16, float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return kNan16;
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and above
  // Below 2^-14 numbers are multiples of 2^-24: adding 0.5 rounds to those.
  if (magnitude < 0x38800000)
    return static_cast<uint16_t>(
        sign | (std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000));
  const uint32_t rebiased = magnitude - (112u << 23);
  return static_cast<uint16_t>(sign | (rebiased + 0xfff + (rebiased >> 13 & 1)) >> 13);
}

}  // namespace host

template <class Element>
uint32_t pack(float lo, float hi) {
  return host::narrow(Element{}, lo) | uint32_t{host::narrow(Element{}, hi)} << 16;
}

template <class Element>
float widen_low(uint32_t pair) {
  return host::widen(Element{}, static_cast<uint16_t>(pair));
}
template <class Element>
float widen_high(uint32_t pair) {
  return host::widen(Element{}, static_cast<uint16_t>(pair >> 16));
}

inline float exp2_approx(float x) { return std::exp2(x); }
inline float log2_approx(float x) { return std::log2(x); }
// Like the GPU's, prefers a number to a NaN.
inline float max2(float a, float b) { return b > a || a != a ? b : a; }
// One rounding: the product is exact in double precision.
inline float fma(float a, float b, float c) {
  return static_cast<float>(static_cast<double>(a) * b + c);
}

}  // namespace vsa
