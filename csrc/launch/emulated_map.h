// SPDX-License-Identifier: Apache-2.0
// Tensor maps for the emulator: what the driver would be told.
#pragma once
#include <algorithm>
#include <iterator>

#include "launch/tensor_map.h"
#include "prim/host_copies.h"

namespace vsa::launch {

inline std::string encode_for_emulator(TensorMap& map, const MapArguments& a) {
  map = {a.base, {}, {}, {}};
  std::copy(std::begin(a.dims), std::end(a.dims), map.dims);
  std::copy(std::begin(a.strides), std::end(a.strides), map.strides);
  std::copy(std::begin(a.box), std::end(a.box), map.box);
  return "";
}

}  // namespace vsa::launch
