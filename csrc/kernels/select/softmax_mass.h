// SPDX-License-Identifier: Apache-2.0
// Shares of a softmax in whole numbers: weights of 2^31 and less, the same bits on every machine,
// whose sum does not depend on the order of adding. vsa/backends/pytorch_routing.py has the same
// arithmetic on tensors.
//
//   weight = 2^31 * e^-gap, where gap is how far a score lies below its row's largest
//
// gap * log2(e) is rounded to 2^-24. Its whole part is a shift; 2^-f of the fraction f is a
// polynomial with a relative error under 1e-7. A weight under 2^-32 of the largest is 0.
#pragma once
#include <cstdint>

#include "prim/facts.h"

namespace vsa {

constexpr uint32_t kFullWeight = 1u << 31;

// a b / 2^32
VSA_HD uint32_t high_product(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(uint64_t{a} * b >> 32);
}

// 2^-f of f = fraction / 2^32, times 2^31: 1 - f (d1 - f (d2 - ...)).
VSA_HD uint32_t exp2_of_fraction(uint32_t fraction) {
  uint32_t tail = 2029165;
  tail = 19769300 - high_product(tail, fraction);
  tail = 118750172 - high_product(tail, fraction);
  tail = 515782929 - high_product(tail, fraction);
  tail = 1488514807 - high_product(tail, fraction);
  return kFullWeight - high_product(tail, fraction);
}

VSA_HD uint32_t softmax_weight(float gap) {
  constexpr float kLog2e = 1.44269504f, kMost = 33;
  const float bits = gap * kLog2e < kMost ? gap * kLog2e : kMost;
  const uint32_t fixed = static_cast<uint32_t>(bits * (1 << 24));
  const uint32_t whole = fixed >> 24;
  if (whole >= 32) return 0;
  return (exp2_of_fraction(fixed << 8) + (1u << whole >> 1)) >> whole;
}

namespace facts {

static_assert(softmax_weight(0) == kFullWeight, "the largest score has the full weight");
static_assert(softmax_weight(0.69314719f) == kFullWeight >> 1, "ln 2 below it has half of it");
static_assert(softmax_weight(22.2f) == 0 && softmax_weight(22.1f) == 1, "weights end at 2^-32");

}  // namespace facts

}  // namespace vsa
