// SPDX-License-Identifier: Apache-2.0
// The forward kernel on a GPU.
#include "launch/fine_params.h"
#include "launch/tensor_core_launch.h"

namespace vsa::launch {
namespace {

template <class Epilogue>
std::string launch_forward(const FineForward& call, int device, void* stream) {
  typename Epilogue::Params params{};
  if (const std::string error = make_params(params, call, encode); !error.empty()) return error;
  bool found = true;  // a kernel for this configuration
  const auto launch = [&](cudaStream_t stream) {
    cudaError_t error = cudaSuccess;
    found = with_config(call, [&](auto element, auto head_dim) {
      using Kernel = vsa::FineForward<FineForwardConfig<decltype(element), head_dim()>, Epilogue>;
      error = launch_persistent<Kernel>(params, params.queries, params.heads, device, stream);
    });
    return error;
  };
  const std::string error = launch_on(device, stream, "the forward kernel", launch);
  return found ? error : kNoConfig;
}

}  // namespace

std::string fine_forward(const FineForward& call, int device, void* stream) {
  return any(call.gates) ? launch_forward<GatedOutput>(call, device, stream)
                         : launch_forward<PlainOutput>(call, device, stream);
}

}  // namespace vsa::launch
