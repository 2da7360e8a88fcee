// SPDX-License-Identifier: Apache-2.0
// The primitives of warp.h on the GPU: a lane is a thread.
#pragma once
#include "prim/sm90.h"

namespace vsa {

VSA_DEVICE int float_bits(float x) { return __float_as_int(x); }
VSA_DEVICE float float_of(int bits) { return __int_as_float(bits); }

VSA_DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <class Element>
VSA_DEVICE uint32_t max_pairs(uint32_t a, uint32_t b) {
  uint32_t most;
  if constexpr (std::is_same_v<Element, Bf16>)
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
  else
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
  return most;
}
template <class Element>
VSA_DEVICE uint32_t min_pairs(uint32_t a, uint32_t b) {
  uint32_t least;
  if constexpr (std::is_same_v<Element, Bf16>)
    asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(least) : "r"(a), "r"(b));
  else
    asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(least) : "r"(a), "r"(b));
  return least;
}

VSA_DEVICE int64_t nearest_integer(float x) { return __float2ll_rn(x); }
VSA_DEVICE void atomic_max(int* to, int x) { atomicMax(to, x); }
VSA_DEVICE void atomic_add(int* to, int x) { atomicAdd(to, x); }
VSA_DEVICE void atomic_add(int64_t* to, int64_t x) {
  atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(x));
}

VSA_DEVICE void stop_unless(bool test) {
  if (!test) __trap();
}

template <class T>
VSA_DEVICE T* no_hoist(T* pointer) {
  asm("" : "+l"(pointer));
  return pointer;
}

template <int N>
struct Floats {
  float x[N];
};

namespace ptx {

VSA_DEVICE float widen(Bf16, uint32_t bits) { return __uint_as_float(bits << 16); }
VSA_DEVICE float widen(Fp16, uint32_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<uint16_t>(bits)));
  return x;
}

}  // namespace ptx

// No branch around the load: several can then be in flight.
template <class Element, int N>
VSA_DEVICE Floats<N> load_floats(const void* array, int64_t index, bool wanted) {
  Floats<N> values;
  if constexpr (std::is_same_v<Element, float>) {
    const float* from = static_cast<const float*>(array) + index;
    if constexpr (N == 1) {
      values = {{__ldg(from)}};
    } else {
      const float4 loaded = __ldg(reinterpret_cast<const float4*>(from));
      values = {{loaded.x, loaded.y, loaded.z, loaded.w}};
    }
    VSA_UNROLL
    for (float& x : values.x) x = wanted ? x : 0;
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(array) + index;
    uint32_t pairs[(N + 1) / 2];
    if constexpr (N == 1) {
      pairs[0] = __ldg(from);
    } else if constexpr (N == 2) {
      pairs[0] = __ldg(reinterpret_cast<const uint32_t*>(from));
    } else if constexpr (N == 4) {
      const uint2 loaded = __ldg(reinterpret_cast<const uint2*>(from));
      pairs[0] = loaded.x, pairs[1] = loaded.y;
    } else {
      const uint4 loaded = __ldg(reinterpret_cast<const uint4*>(from));
      pairs[0] = loaded.x, pairs[1] = loaded.y, pairs[2] = loaded.z, pairs[3] = loaded.w;
    }
    VSA_UNROLL
    for (uint32_t& pair : pairs) pair = wanted ? pair : 0;
    VSA_UNROLL
    for (int i = 0; i < N; ++i)
      values.x[i] = ptx::widen(Element{}, pairs[i / 2] >> i % 2 * 16 & 0xffff);
  }
  return values;
}

template <class T>
class PerLane {
 public:
  VSA_DEVICE T& operator[](int) { return own_; }

 private:
  T own_;
};

VSA_DEVICE int own_lane() { return static_cast<int>(threadIdx.x) % kWarpThreads; }

template <class Fn>
VSA_DEVICE void each_lane(Fn fn) {
  fn(own_lane());
}

template <class Test>
VSA_DEVICE uint32_t ballot(Test test) {
  return __ballot_sync(~0u, test(own_lane()));
}

// By the instruction that leaves its result in a uniform register: the compiler then knows that
// branches on it do not diverge. It adds 32 bits; 24 at a time cannot overflow.
template <class Value>
VSA_DEVICE auto sum(Value value) {
  const auto own = value(own_lane());
  if constexpr (std::is_same_v<decltype(value(0)), int>) {
    return __reduce_add_sync(~0u, own);
  } else if constexpr (std::is_same_v<decltype(value(0)), float>) {
    float total = own;
    VSA_UNROLL
    for (int other = kWarpThreads / 2; other > 0; other /= 2)
      total += __shfl_xor_sync(~0u, total, other);
    return __int_as_float(__reduce_max_sync(~0u, __float_as_int(total)));
  } else {
    const uint64_t low = __reduce_add_sync(~0u, static_cast<uint32_t>(own) & 0xffffff);
    const uint64_t middle = __reduce_add_sync(~0u, static_cast<uint32_t>(own >> 24) & 0xffffff);
    const uint64_t high = __reduce_add_sync(~0u, static_cast<uint32_t>(own >> 48));
    return low + (middle << 24) + (high << 48);
  }
}
template <class Value>
VSA_DEVICE int greatest(Value value) {
  return __reduce_max_sync(~0u, value(own_lane()));
}
template <class T>
VSA_DEVICE T broadcast(PerLane<T>& values, int lane) {
  return __shfl_sync(~0u, values[lane], lane);
}
VSA_DEVICE void warp_sync() { __syncwarp(); }
template <class Fn>
VSA_DEVICE auto first_lane(Fn fn) {
  decltype(fn()) found{};
  if (own_lane() == 0) found = fn();
  return __shfl_sync(~0u, found, 0);
}

}  // namespace vsa
