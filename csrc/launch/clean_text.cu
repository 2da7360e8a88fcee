// SPDX-License-Identifier: Apache-2.0
// Text ahead of the fine kernels on a GPU: rows and copies are the second axis of one launch.
#include <algorithm>

#include "launch/clean_text_params.h"
#include "launch/cuda_launch.h"

namespace vsa::launch {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads)
    clean_text_kernel(const __grid_constant__ CleanTextParams params) {
  const int tensor = static_cast<int>(blockIdx.y) - 1;
  const int64_t lane = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (tensor < 0) {
    if (lane < params.row_lanes) vsa::CleanText::rows(params, lane);
  } else if (lane < params.tensors[tensor].lanes) {
    vsa::CleanText::copy(params, tensor, lane);
  }
}

}  // namespace

std::string clean_text(const CleanText& call, int device, void* stream) {
  CleanTextParams params;
  if (const std::string error = make_params(params, call); !error.empty()) return error;
  int64_t most = params.row_lanes;
  for (int tensor = 0; tensor < params.count; ++tensor)
    most = std::max(most, params.tensors[tensor].lanes);
  const dim3 grid(static_cast<unsigned>((most + kThreads - 1) / kThreads), params.count + 1);
  return launch_on(device, stream, "the kernel of text", [&](cudaStream_t stream) {
    clean_text_kernel<<<grid, kThreads, 0, stream>>>(params);
    return cudaGetLastError();
  });
}

}  // namespace vsa::launch
