// SPDX-License-Identifier: Apache-2.0
// The forward kernel on a GPU.
#include "launch/fine_params.h"
#include "launch/sm90_launch.h"

namespace vsa::launch {

std::string fine_forward(const FineForward& call, int device, void* stream) {
  FineForwardParams params{};
  if (const std::string error = make_params(params, call, encode); !error.empty()) return error;
  cudaError_t error = cudaSuccess;
  const bool found = with_config(call, [&](auto element, auto head_dim) {
    using Kernel = vsa::FineForward<FineForwardConfig<decltype(element), head_dim()>>;
    error = launch_persistent<Kernel>(params, params.queries, params.heads, device,
                                      static_cast<cudaStream_t>(stream));
  });
  return found ? not_launched("the forward kernel", error) : kNoConfig;
}

}  // namespace vsa::launch
