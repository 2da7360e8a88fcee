// SPDX-License-Identifier: Apache-2.0
// The forward kernel on a GPU.
#include "launch/fine_params.h"
#include "launch/sm90_launch.h"

namespace vsa::launch {
namespace {

template <class Epilogue>
std::string launch_forward(const FineForward& call, int device, cudaStream_t stream) {
  typename Epilogue::Params params{};
  if (const std::string error = make_params(params, call, encode); !error.empty()) return error;
  cudaError_t error = cudaSuccess;
  const bool found = with_config(call, [&](auto element, auto head_dim) {
    using Config = FineForwardConfig<decltype(element), head_dim()>;
    error = cudaMemsetAsync(call.tickets, 0, sizeof(int), stream);
    if (error != cudaSuccess) return;
    error = launch_persistent<vsa::FineForward<Config, Epilogue>>(params, params.queries,
                                                                  params.heads, device, stream);
  });
  return found ? not_launched("the forward kernel", error) : kNoConfig;
}

}  // namespace

std::string fine_forward(const FineForward& call, int device, void* opaque_stream) {
  const auto stream = static_cast<cudaStream_t>(opaque_stream);
  return any(call.gates) ? launch_forward<GatedOutput>(call, device, stream)
                         : launch_forward<PlainOutput>(call, device, stream);
}

}  // namespace vsa::launch
