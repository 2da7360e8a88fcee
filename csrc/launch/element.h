// SPDX-License-Identifier: Apache-2.0
// From the dtype that a call names to the type that its kernel computes with.
#pragma once

#include "launch/fine.h"
#include "prim/operand.h"

namespace vsa::launch {

template <Dtype dtype>
auto element() {
  if constexpr (dtype == Dtype::Bf16)
    return Bf16{};
  else if constexpr (dtype == Dtype::Fp16)
    return Fp16{};
  else
    return float{};
}

// fn(Element{}) for a dtype of the list; false, and no call, for any other.
template <class Fn, Dtype... dtypes>
bool with_element(Dtype dtype, Values<dtypes...>, Fn fn) {
  return ((dtype == dtypes && (fn(element<dtypes>()), true)) || ...);
}

}  // namespace vsa::launch
