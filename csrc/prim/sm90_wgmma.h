// SPDX-License-Identifier: Apache-2.0
// The operand lists of wgmma.mma_async: D[64 x N] fp32 (+)= A[64 x 16] B[16 x N], N = 64 or 128.
#pragma once
#include <cstdint>
#include <type_traits>

#include "prim/operand.h"

namespace vsa::ptx {

// "+f" operands d[0..N/2), and their names in the instruction.
#define VSA_EIGHT(i)                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define VSA_D_64 VSA_EIGHT(0), VSA_EIGHT(8), VSA_EIGHT(16), VSA_EIGHT(24)
#define VSA_D_128 VSA_D_64, VSA_EIGHT(32), VSA_EIGHT(40), VSA_EIGHT(48), VSA_EIGHT(56)
#define VSA_NAMES_64                                           \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16," \
  "%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define VSA_NAMES_128                                                        \
  VSA_NAMES_64                                                               \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49" \
  ",%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// The inputs follow the N/2 registers of D, so their numbers depend on N.
#define VSA_SS(N, TYPE, A, B, ACCUMULATE, TRANS_A, TRANS_B)                              \
  asm volatile("{.reg .pred p; setp.ne.b32 p, " ACCUMULATE                               \
               ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE     \
               " {" VSA_NAMES_##N "}, " A ", " B ", p, 1, 1, " TRANS_A ", " TRANS_B ";}" \
               : VSA_D_##N                                                               \
               : "l"(a), "l"(b), "r"(accumulate), "n"(int{TransA}), "n"(int{TransB}))
#define VSA_RS(N, TYPE, A, B, ACCUMULATE, TRANS_B)                                             \
  asm volatile(                                                                                \
      "{.reg .pred p; setp.ne.b32 p, " ACCUMULATE ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N \
      "k16.f32." TYPE "." TYPE " {" VSA_NAMES_##N "}, {" A "}, " B ", p, 1, 1, " TRANS_B ";}"  \
      : VSA_D_##N                                                                              \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(int{TransB}))

// a, b: descriptors
template <class Element, bool TransA, bool TransB, int Registers>
__device__ __forceinline__ void wgmma(float (&d)[Registers],
                                      uint64_t a,
                                      uint64_t b,
                                      int accumulate) {
  static_assert(Registers == 32 || Registers == 64, "products are 64 or 128 columns wide");
  constexpr bool kBf16 = std::is_same_v<Element, Bf16>;
  if constexpr (Registers == 32 && kBf16) VSA_SS(64, "bf16", "%32", "%33", "%34", "%35", "%36");
  if constexpr (Registers == 32 && !kBf16) VSA_SS(64, "f16", "%32", "%33", "%34", "%35", "%36");
  if constexpr (Registers == 64 && kBf16) VSA_SS(128, "bf16", "%64", "%65", "%66", "%67", "%68");
  if constexpr (Registers == 64 && !kBf16) VSA_SS(128, "f16", "%64", "%65", "%66", "%67", "%68");
}

// a: four registers, each a pair of elements; b: descriptor
template <class Element, bool TransB, int Registers>
__device__ __forceinline__ void wgmma(float (&d)[Registers],
                                      const uint32_t* a,
                                      uint64_t b,
                                      int accumulate) {
  static_assert(Registers == 32 || Registers == 64, "products are 64 or 128 columns wide");
  constexpr bool kBf16 = std::is_same_v<Element, Bf16>;
  if constexpr (Registers == 32 && kBf16)
    VSA_RS(64, "bf16", "%32,%33,%34,%35", "%36", "%37", "%38");
  if constexpr (Registers == 32 && !kBf16)
    VSA_RS(64, "f16", "%32,%33,%34,%35", "%36", "%37", "%38");
  if constexpr (Registers == 64 && kBf16)
    VSA_RS(128, "bf16", "%64,%65,%66,%67", "%68", "%69", "%70");
  if constexpr (Registers == 64 && !kBf16)
    VSA_RS(128, "f16", "%64,%65,%66,%67", "%68", "%69", "%70");
}

#undef VSA_EIGHT
#undef VSA_D_64
#undef VSA_D_128
#undef VSA_NAMES_64
#undef VSA_NAMES_128
#undef VSA_SS
#undef VSA_RS

}  // namespace vsa::ptx
