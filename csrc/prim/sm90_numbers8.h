// SPDX-License-Identifier: Apache-2.0
// The primitives of prim.h for 8-bit numbers, and for those that become them, as PTX.
#pragma once
#include <cstdint>

#include "prim/operand8.h"

namespace vsa {

namespace ptx {

// Four e4m3 numbers; what is too large becomes the largest, infinity too, and NaN stays NaN.
__device__ __forceinline__ uint32_t pack8(E4m3, float a, float b, float c, float d) {
  uint32_t fours;
  asm("{.reg .b16 lo, hi;\ncvt.rn.satfinite.e4m3x2.f32 lo, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 hi, %4, %3;\nmov.b32 %0, {lo, hi};}"
      : "=r"(fours)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return fours;
}
__device__ __forceinline__ uint32_t pack8(S8, float a, float b, float c, float d) {
  const auto bits = [](float x) { return __float_as_uint(__fadd_rn(x, kNearestInteger)); };
  const uint32_t lo = __byte_perm(bits(a), bits(b), 0x0040);
  const uint32_t hi = __byte_perm(bits(c), bits(d), 0x0040);
  return __byte_perm(lo, hi, 0x5410);
}

}  // namespace ptx

template <class Element>
__device__ __forceinline__ uint32_t pack8(float a, float b, float c, float d) {
  return ptx::pack8(Element{}, a, b, c, d);
}

__device__ __forceinline__ void widen_e4m3(float (&x)[4], uint32_t fours) {
  asm("{.reg .b16 lo, hi, a, b, c, d;\n.reg .b32 ab, cd;\nmov.b32 {lo, hi}, %4;\n"
      "cvt.rn.f16x2.e4m3x2 ab, lo;\ncvt.rn.f16x2.e4m3x2 cd, hi;\n"
      "mov.b32 {a, b}, ab;\nmov.b32 {c, d}, cd;\ncvt.f32.f16 %0, a;\ncvt.f32.f16 %1, b;\n"
      "cvt.f32.f16 %2, c;\ncvt.f32.f16 %3, d;}"
      : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
      : "r"(fours));
}

__device__ __forceinline__ float biased_float(int x) {
  return __int_as_float(x + __float_as_int(kNearestInteger));
}

__device__ __forceinline__ uint32_t line_codes(float lo, float hi) {
  uint32_t codes;  // the smallest halves are the multiples of kCodeUnit, in order
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(codes) : "f"(hi), "f"(lo));
  return codes;
}

__device__ __forceinline__ uint32_t line_codes(uint32_t x, uint32_t slope, uint32_t offset) {
  uint32_t codes;
  asm("{.reg .b32 halves;\nfma.rn.relu.f16x2 halves, %1, %2, %3;\n"
      "add.rn.f16x2 %0, halves, %4;}"
      : "=r"(codes)
      : "r"(x), "r"(slope), "r"(offset), "r"(0x64006400));  // 1024: the integer is in the low bits
  return codes;
}

__device__ __forceinline__ uint32_t max_halves(uint32_t a, uint32_t b) {
  uint32_t most;
  asm("max.f16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
  return most;
}

__device__ __forceinline__ uint32_t fma_halves(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

__device__ __forceinline__ int max3(int a, int b, int c) { return __vimax3_s32(a, b, c); }

__device__ __forceinline__ uint32_t low_bytes(uint32_t ab, uint32_t cd) {
  return __byte_perm(ab, cd, 0x6420);
}

}  // namespace vsa
