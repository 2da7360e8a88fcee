// SPDX-License-Identifier: Apache-2.0
// What the binding may call: plain C++, no Python, no torch, no CUDA types.
// Functions that can fail return a sentence that says why; empty means that all went well.
#pragma once
#include <cstdint>
#include <string>

#include "prim/facts.h"

namespace vsa::launch {

struct CudaPart {             // how the CUDA part of this binary was built
  bool built;                 // false: host part only
  int version;                // CUDA toolkit, 1000 * major + 10 * minor; 0 without
  const char* architectures;  // space separated, e.g. "sm_90a"; "" without
};
CudaPart cuda_part();

// Never needs a driver: without one the count is 0 and the sentence says so.
std::string device_count(int* count);

struct TileTable {  // device pointers
  int32_t* places;  // [tiles, 4]: first t, h, w (tokens) and the Clip bits
  uint64_t* masks;  // [tiles]: rows that are tokens
  int32_t* tokens;  // [tiles, 64]: position in the sequence, -1 where a row is no token
};

// Evaluates facts.h on the device, from the grid's shape alone, so that a test can hold the
// device's answers against the host's.
std::string device_tile_table(const Grid& grid, const TileTable& table, void* stream);

}  // namespace vsa::launch
