// SPDX-License-Identifier: Apache-2.0
// The primitives of warp.h on a CPU: one thread takes the lanes in turn.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <type_traits>

#include "prim/host.h"

namespace vsa {

inline int float_bits(float x) { return std::bit_cast<int>(x); }
inline float float_of(int bits) { return std::bit_cast<float>(bits); }

inline float reciprocal_approx(float x) { return 1 / x; }

namespace host {

// Of two 16-bit numbers: NaN, or the one that choose(a, b) says, b or not.
template <class Element, class Choose>
uint32_t choose_pairs(uint32_t a, uint32_t b, Choose choose) {
  const auto each = [&](int shift) -> uint32_t {
    const auto x = static_cast<uint16_t>(a >> shift), y = static_cast<uint16_t>(b >> shift);
    const float wide_x = widen(Element{}, x), wide_y = widen(Element{}, y);
    if (std::isnan(wide_x) || std::isnan(wide_y)) return 0x7fff;
    return choose(wide_x, wide_y) ? y : x;
  };
  return each(0) | each(16) << 16;
}

}  // namespace host

template <class Element>
uint32_t max_pairs(uint32_t a, uint32_t b) {
  return host::choose_pairs<Element>(a, b, [](float x, float y) { return y > x; });
}
template <class Element>
uint32_t min_pairs(uint32_t a, uint32_t b) {
  return host::choose_pairs<Element>(a, b, [](float x, float y) { return y < x; });
}

inline int64_t nearest_integer(float x) { return std::llrint(x); }
inline void atomic_max(int* to, int x) { *to = std::max(*to, x); }
template <class T>
void atomic_add(T* to, T x) {
  *to += x;
}

inline void stop_unless(bool test) {
  if (!test) throw host::Hazard("WRONG NUMBER: a size, a count or a tile is out of range");
}

template <class T>
T* no_hoist(T* pointer) {
  return pointer;
}

template <int N>
struct Floats {
  float x[N];
};

template <class Element, int N>
Floats<N> load_floats(const void* array, int64_t index, bool wanted) {
  Floats<N> values = {};
  for (int i = 0; wanted && i < N; ++i) {
    if constexpr (std::is_same_v<Element, float>)
      values.x[i] = static_cast<const float*>(array)[index + i];
    else
      values.x[i] = host::widen(Element{}, static_cast<const uint16_t*>(array)[index + i]);
  }
  return values;
}

template <class T>
class PerLane {
 public:
  T& operator[](int lane) { return all_[lane]; }

 private:
  T all_[kWarpThreads];
};

template <class Fn>
void each_lane(Fn fn) {
  for (int lane = 0; lane < kWarpThreads; ++lane) fn(lane);
}

template <class Test>
uint32_t ballot(Test test) {
  uint32_t word = 0;
  each_lane([&](int lane) { word |= uint32_t{test(lane)} << lane; });
  return word;
}

template <class Value>
auto sum(Value value) {
  decltype(value(0)) total = 0;
  each_lane([&](int lane) { total += value(lane); });
  return total;
}
template <class Value>
int greatest(Value value) {
  int found = value(0);
  each_lane([&](int lane) { found = std::max(found, value(lane)); });
  return found;
}
template <class T>
T broadcast(PerLane<T>& values, int lane) {
  return values[lane];
}
inline void warp_sync() {}
template <class Fn>
auto first_lane(Fn fn) {
  host::machine->current->elected = true;
  const auto found = fn();
  host::machine->current->elected = false;
  return found;
}

}  // namespace vsa
