// SPDX-License-Identifier: Apache-2.0
// How this binary was built and which devices it sees.
#pragma once
#include <string>

namespace vsa::launch {

struct CudaPart {             // how the CUDA part of this binary was built
  bool built;                 // false: host part only
  int version;                // CUDA toolkit, 1000 * major + 10 * minor; 0 without
  const char* architectures;  // space separated, e.g. "sm_90a"; "" without
};
CudaPart cuda_part();

// Needs no driver: without one the count is 0 and the sentence says so; empty if all went well.
std::string device_count(int* count);

}  // namespace vsa::launch
