// SPDX-License-Identifier: Apache-2.0
// What the files of the binding share: checks of arguments, and errors as exceptions.
#pragma once
#include <pybind11/pybind11.h>

#include <array>
#include <climits>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "prim/facts.h"

namespace vsa::bind {

using GridNumbers = std::array<int, 8>;  // T, H, W, tile t, h, w, prefix, suffix

inline void require(bool holds, const std::string& otherwise) {
  if (!holds) throw pybind11::value_error(otherwise);
}

inline void raise_if(const std::string& error) {
  if (!error.empty()) throw std::runtime_error("vsa: " + error);
}

inline Grid checked_grid(const GridNumbers& n) {
  for (int axis = 0; axis < 6; ++axis)
    require(n[axis] > 0, "grid: sizes of video and tile must be positive, got " +
                             std::to_string(n[axis]) + " at index " + std::to_string(axis));
  require(n[6] >= 0 && n[7] >= 0, "grid: prefix and suffix must not be negative");
  // Each product is bounded before the next factor joins, so that none of them can overflow.
  const auto volume_fits = [&](int axis, int64_t limit) {
    int64_t volume = n[axis];
    for (int next : {axis + 1, axis + 2})
      if (volume <= limit) volume *= n[next];
    return volume <= limit;
  };
  require(volume_fits(3, vsa::kTileRows), "grid: a tile must hold at most 64 tokens");
  require(volume_fits(0, int64_t{INT_MAX} - vsa::kTileRows - n[6] - n[7]),
          "grid: the sequence has more tokens than 31 bits can number");
  return vsa::make_grid({n[0], n[1], n[2]}, {n[3], n[4], n[5]}, n[6], n[7]);
}

void bind_fine(pybind11::module_& m);
void bind_routing(pybind11::module_& m);

}  // namespace vsa::bind
