// SPDX-License-Identifier: Apache-2.0
// The primitives of prim.h as PTX: each one instruction, or a short run of them.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "prim/operand8.h"
#include "prim/sm90_barriers.h"
#include "prim/sm90_numbers8.h"
#include "prim/sm90_wgmma.h"
#include "prim/sm90_wgmma8.h"

namespace vsa {

// ---- numbers ------------------------------------------------------------------------------------

template <class Element>
VSA_DEVICE uint32_t pack(float lo, float hi) {
  uint32_t pair;
  if constexpr (std::is_same_v<Element, Bf16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
  return pair;
}

template <class Element>
VSA_DEVICE float widen_low(uint32_t pair) {
  float x;
  if constexpr (std::is_same_v<Element, Bf16>)
    x = __uint_as_float(pair << 16);
  else
    asm("{.reg .b16 lo, hi; mov.b32 {lo, hi}, %1; cvt.f32.f16 %0, lo;}" : "=f"(x) : "r"(pair));
  return x;
}

template <class Element>
VSA_DEVICE float widen_high(uint32_t pair) {
  float x;
  if constexpr (std::is_same_v<Element, Bf16>)
    x = __uint_as_float(pair & 0xffff0000);
  else
    asm("{.reg .b16 lo, hi; mov.b32 {lo, hi}, %1; cvt.f32.f16 %0, hi;}" : "=f"(x) : "r"(pair));
  return x;
}

VSA_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

VSA_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

VSA_DEVICE float max2(float a, float b) { return fmaxf(a, b); }
VSA_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }

template <class T>
VSA_DEVICE T load_global(const T* pointer) {
  return __ldg(pointer);
}

VSA_DEVICE Chunk load_global(const Chunk* pointer) {
  const uint4 pairs = __ldg(reinterpret_cast<const uint4*>(pointer));
  return {{pairs.x, pairs.y, pairs.z, pairs.w}};
}

// By a predicate on the instruction: no branch, and no need to wait for what has come.
VSA_DEVICE float load_global(const float* pointer, bool wanted) {
  float x;
  asm("{.reg .pred wanted;\nsetp.ne.s32 wanted, %2, 0;\nmov.f32 %0, 0f00000000;\n"
      "@wanted ld.global.nc.f32 %0, [%1];}"
      : "=f"(x)
      : "l"(pointer), "r"(int{wanted}));
  return x;
}
VSA_DEVICE FloatPair load_global(const FloatPair* pointer, bool wanted) {
  FloatPair pair;
  asm("{.reg .pred wanted;\nsetp.ne.s32 wanted, %3, 0;\nmov.f32 %0, 0f00000000;\n"
      "mov.f32 %1, 0f00000000;\n@wanted ld.global.nc.v2.f32 {%0, %1}, [%2];}"
      : "=f"(pair.x), "=f"(pair.y)
      : "l"(pointer), "r"(int{wanted}));
  return pair;
}

VSA_DEVICE int take_tile(int* counter) {
  int tile;
  asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], 1;"
               : "=r"(tile)
               : "l"(counter)
               : "memory");
  return tile;
}

// ---- who am I -----------------------------------------------------------------------------------

VSA_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
VSA_DEVICE int block_count() { return static_cast<int>(gridDim.x); }
// With this instruction ptxas knows that one thread is left, and issues copies without a loop over
// threads.
VSA_DEVICE bool elect_lane() {
  uint32_t elected;
  asm volatile("{.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;}"
               : "=r"(elected));
  return elected != 0;
}
VSA_DEVICE bool elect_one() {
  return __shfl_sync(~0u, threadIdx.x, 0) % kWarpgroupThreads == 0 && elect_lane();
}

template <int Registers>
VSA_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
VSA_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

// ---- copies -------------------------------------------------------------------------------------

// A CUtensorMap, by size and alignment: kernels need no header of the driver.
struct alignas(64) TensorMap {
  unsigned char opaque[128];
};

VSA_DEVICE void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

VSA_DEVICE void tma_load_panel(void* panel,
                               const TensorMap& map,
                               BoxCoordinates at,
                               Mbarrier& barrier,
                               CacheHint hint = CacheHint::Normal) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(smem_address(panel)),
      "l"(&map), "r"(smem_address(&barrier)), "r"(at.channel), "r"(at.w), "r"(at.h), "r"(at.t),
      "r"(at.outer), "l"(static_cast<uint64_t>(hint))
      : "memory");
}

VSA_DEVICE void tma_store_panel(const TensorMap& map, BoxCoordinates at, const void* panel) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::
          "l"(&map),
      "r"(smem_address(panel)), "r"(at.channel), "r"(at.w), "r"(at.h), "r"(at.t), "r"(at.outer)
      : "memory");
}

VSA_DEVICE void bulk_load(void* to,
                          const void* from,
                          int bytes,
                          Mbarrier& barrier,
                          Layout = Layout::Linear) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(smem_address(to)),
      "l"(from), "r"(bytes), "r"(smem_address(&barrier))
      : "memory");
}

VSA_DEVICE void bulk_reduce_add(float* to, const float* from, int bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
      "r"(smem_address(from)), "r"(bytes)
      : "memory");
}

VSA_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

template <int Pending>
VSA_DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}
template <int Pending>
VSA_DEVICE void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(Pending) : "memory");
}

// ---- matrix products ----------------------------------------------------------------------------

VSA_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
VSA_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <class Element, bool TransA, bool TransB, int N>
VSA_DEVICE void wgmma(Fragment<N>& d, uint64_t a, uint64_t b, bool accumulate) {
  ptx::wgmma<Element, TransA, TransB>(d.x, a, b, accumulate);
}

template <class Element, bool TransB, int N, int K>
VSA_DEVICE void wgmma(Fragment<N>& d, const Operand<K>& a, int k16, uint64_t b, bool accumulate) {
  ptx::wgmma<Element, TransB>(d.x, a.x + 4 * k16, b, accumulate);
}

template <class Element, int N, class T>
VSA_DEVICE void wgmma8(Fragment<N, T>& d, uint64_t a, uint64_t b, bool accumulate) {
  ptx::wgmma8(Element{}, d.x, a, b, accumulate);
}

template <class Element, int N, class T, int K>
VSA_DEVICE void wgmma8(Fragment<N, T>& d,
                       const Operand8<K>& a,
                       int k32,
                       uint64_t b,
                       bool accumulate) {
  ptx::wgmma8(Element{}, d.x, a.x + 4 * k32, b, accumulate);
}

namespace ptx {

VSA_DEVICE void pin(float& x) { asm volatile("" : "+f"(x)::"memory"); }
VSA_DEVICE void pin(int& x) { asm volatile("" : "+r"(x)::"memory"); }
VSA_DEVICE void pin(uint32_t& x) { asm volatile("" : "+r"(x)::"memory"); }

}  // namespace ptx

// The compiler does not know that products finish later: the empty statement keeps it from moving a
// use of the finished registers above the wait.
template <int Pending, class... Fragments>
VSA_DEVICE void wgmma_wait(Fragments&... finished) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
  const auto pin_all = [&](auto& registers) {
    VSA_UNROLL
    for (auto& x : registers) ptx::pin(x);
  };
  (pin_all(finished.x), ...);
}

}  // namespace vsa
