// SPDX-License-Identifier: Apache-2.0
// What a warpgroup holds in registers, and what its lanes tell each other, as PTX.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "prim/operand.h"

#define VSA_DEVICE __device__ __forceinline__
#define VSA_UNROLL _Pragma("unroll")

namespace vsa {

// Not a loop of one trip: nvcc does not fold that, and doubles the code.
#define VSA_EACH_LANE(t) if (const int t = threadIdx.x % kWarpgroupThreads; true)

template <int N, class T = float>
struct Fragment {
  T x[N / 2];
};
template <int N>
struct Fragment<N, Fp16> {
  uint32_t x[N / 4];
};

template <int K>
struct Operand {
  uint32_t x[K / 4];
};

template <int K>
struct Operand8 {
  uint32_t x[K / 8];
};

struct RowValues {
  float x[2];  // rows r and r + 8 of the thread's quad
};

template <class Registers>
VSA_DEVICE auto& lane(Registers& f, int) {
  return f.x;
}

template <class Op>
VSA_DEVICE void quad_reduce(RowValues& values, Op op) {
  VSA_UNROLL
  for (float& x : values.x) {
    x = op(x, __shfl_xor_sync(~0u, x, 1));
    x = op(x, __shfl_xor_sync(~0u, x, 2));
  }
}

template <int Rows, int N, class Op>
VSA_DEVICE void neighbour_reduce(Fragment<N>& f, Op op) {
  VSA_UNROLL
  for (int apart = 1; apart < Rows; apart *= 2) {
    VSA_UNROLL
    for (float& x : f.x) x = op(x, __shfl_xor_sync(~0u, x, 4 * apart));
  }
}

template <class Test, class Then>
VSA_DEVICE void if_any_row(const RowValues& values, Test test, Then then) {
  if (__any_sync(~0u, test(values.x[0]) || test(values.x[1]))) then();
}

struct WarpFlag {
  bool set;
};

template <class Test>
VSA_DEVICE WarpFlag any_row(const RowValues& a, const RowValues& b, const RowValues& c, Test test) {
  return {__any_sync(~0u, test(a.x[0], b.x[0], c.x[0]) | test(a.x[1], b.x[1], c.x[1])) != 0};
}
template <class Then>
VSA_DEVICE void if_warp(const WarpFlag& flag, Then then) {
  if (flag.set) then();
}

VSA_DEVICE int no_hoist(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

}  // namespace vsa
