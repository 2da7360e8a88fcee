// SPDX-License-Identifier: Apache-2.0
// The operand lists of 8-bit wgmma.mma_async: D[64 x N] (+)= A[64 x 32] B[32 x N]. Products that
// kernels use and no others:
//
//   s8, N = 64            scores as 32-bit integers
//   e4m3, N = 64          scores in fp32 or in pairs of halves
//   e4m3, N = 72 or 136   outputs of 64 or 128 channels, and eight columns for the row sums
#pragma once
#include <cstdint>

#include "prim/operand8.h"

namespace vsa::ptx {

// Operands d[i..) of one constraint, "+f" or "+r", and their names in the instruction.
#define VSA_FOUR(is, i) is(d[i]), is(d[i + 1]), is(d[i + 2]), is(d[i + 3])
#define VSA_SIXTEEN(is, i) \
  VSA_FOUR(is, i), VSA_FOUR(is, i + 4), VSA_FOUR(is, i + 8), VSA_FOUR(is, i + 12)
#define VSA_D_16(is) VSA_SIXTEEN(is, 0)
#define VSA_D_32(is) VSA_D_16(is), VSA_SIXTEEN(is, 16)
#define VSA_D_36(is) VSA_D_32(is), VSA_FOUR(is, 32)
#define VSA_D_68(is) VSA_D_32(is), VSA_SIXTEEN(is, 32), VSA_SIXTEEN(is, 48), VSA_FOUR(is, 64)
#define VSA_NAMES_16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define VSA_NAMES_32 VSA_NAMES_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define VSA_NAMES_36 VSA_NAMES_32 ",%32,%33,%34,%35"
#define VSA_NAMES_68                                                                 \
  VSA_NAMES_36                                                                       \
  ",%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55" \
  ",%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67"

// a: a descriptor, or four registers of four elements each. The inputs follow the REGISTERS of D,
// so their numbers depend on them: A, B and ACCUMULATE name them. FACTORS: of A and B, which
// integers have none of
#define VSA_WGMMA8(Tag, Register, is, REGISTERS, SHAPE, FACTORS, A, B, ACCUMULATE, RS_A, RS_B,     \
                   RS_C)                                                                           \
  __device__ __forceinline__ void wgmma8(Tag, Register(&d)[REGISTERS], uint64_t a, uint64_t b,     \
                                         int accumulate) {                                         \
    asm volatile("{.reg .pred p; setp.ne.b32 p, " ACCUMULATE                                       \
                 ", 0;\nwgmma.mma_async.sync.aligned." SHAPE " {" VSA_NAMES_##REGISTERS            \
                 "}, " A ", " B ", p" FACTORS ";}"                                                 \
                 : VSA_D_##REGISTERS(is)                                                           \
                 : "l"(a), "l"(b), "r"(accumulate));                                               \
  }                                                                                                \
  __device__ __forceinline__ void wgmma8(Tag, Register(&d)[REGISTERS], const uint32_t* a,          \
                                         uint64_t b, int accumulate) {                             \
    asm volatile("{.reg .pred p; setp.ne.b32 p, " RS_C ", 0;\nwgmma.mma_async.sync.aligned." SHAPE \
                 " {" VSA_NAMES_##REGISTERS "}, {" RS_A "}, " RS_B ", p" FACTORS ";}"              \
                 : VSA_D_##REGISTERS(is)                                                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));           \
  }

VSA_WGMMA8(S8,
           int,
           "+r",
           32,
           "m64n64k32.s32.s8.s8",
           "",
           "%32",
           "%33",
           "%34",
           "%32,%33,%34,%35",
           "%36",
           "%37")
VSA_WGMMA8(E4m3,
           float,
           "+f",
           32,
           "m64n64k32.f32.e4m3.e4m3",
           ", 1, 1",
           "%32",
           "%33",
           "%34",
           "%32,%33,%34,%35",
           "%36",
           "%37")
VSA_WGMMA8(E4m3,
           uint32_t,
           "+r",
           16,
           "m64n64k32.f16.e4m3.e4m3",
           ", 1, 1",
           "%16",
           "%17",
           "%18",
           "%16,%17,%18,%19",
           "%20",
           "%21")
VSA_WGMMA8(E4m3,
           float,
           "+f",
           36,
           "m64n72k32.f32.e4m3.e4m3",
           ", 1, 1",
           "%36",
           "%37",
           "%38",
           "%36,%37,%38,%39",
           "%40",
           "%41")
VSA_WGMMA8(E4m3,
           float,
           "+f",
           68,
           "m64n136k32.f32.e4m3.e4m3",
           ", 1, 1",
           "%68",
           "%69",
           "%70",
           "%68,%69,%70,%71",
           "%72",
           "%73")

#undef VSA_FOUR
#undef VSA_SIXTEEN
#undef VSA_D_16
#undef VSA_D_32
#undef VSA_D_36
#undef VSA_D_68
#undef VSA_NAMES_16
#undef VSA_NAMES_32
#undef VSA_NAMES_36
#undef VSA_NAMES_68
#undef VSA_WGMMA8

}  // namespace vsa::ptx
