// SPDX-License-Identifier: Apache-2.0
// What this build holds and which devices there are, for builds with a CUDA part.
#include "launch/build_info.h"
#include "launch/cuda_launch.h"

namespace vsa::launch {

CudaPart cuda_part() { return {true, CUDART_VERSION, "sm_90a"}; }

std::string device_count(int* count) {
  *count = 0;
  return sentence("no CUDA device can be used", cudaGetDeviceCount(count));
}

}  // namespace vsa::launch
