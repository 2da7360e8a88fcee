// SPDX-License-Identifier: Apache-2.0
// The kernels of low precision on a GPU.
#include "launch/low_precision_params.h"
#include "launch/tensor_core_launch.h"

namespace vsa::launch {
namespace {

constexpr int kWarpsPerBlock = 8, kBlocks = 3;  // of a multiprocessor

// A warp for each piece of work.
template <class Kernel>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarpThreads, kBlocks)
    warps_kernel(const __grid_constant__ QuantiseTilesParams params) {
  // Through a shuffle, so that the compiler knows it to be the same for the whole warp.
  const int own = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpThreads, 0);
  const int64_t warp = int64_t{blockIdx.x} * kWarpsPerBlock + own;
  if (warp < Kernel::warps(params)) Kernel::run(params, warp);
}

template <class Kernel>
cudaError_t launch_warps(const QuantiseTilesParams& params, cudaStream_t stream) {
  const int64_t warps = Kernel::warps(params);
  const auto blocks = static_cast<unsigned>((warps + kWarpsPerBlock - 1) / kWarpsPerBlock);
  warps_kernel<Kernel><<<blocks, kWarpsPerBlock * kWarpThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

template <class Epilogue>
std::string launch_forward(const LowPrecisionForward& call, int device, void* stream) {
  LowPrecisionParams<typename Epilogue::Params> params{};
  if (const std::string error = make_params(params, call, encode); !error.empty()) return error;
  bool found = true;  // a kernel for this configuration
  const auto launch = [&](cudaStream_t stream) {
    cudaError_t error = cudaSuccess;
    found = with_low_precision(call, [&](auto config) {
      using Kernel = vsa::LowPrecisionForward<decltype(config), Epilogue>;
      error = launch_persistent<Kernel>(params, params.queries, params.heads, device, stream);
    });
    return error;
  };
  const std::string error =
      launch_on(device, stream, "the forward kernel of low precision", launch);
  return found ? error : kNoConfig;
}

}  // namespace

std::string low_precision_forward(const LowPrecisionForward& call, int device, void* stream) {
  return any(call.gates) ? launch_forward<GatedOutput>(call, device, stream)
                         : launch_forward<PlainOutput>(call, device, stream);
}

std::string channel_statistics(const ChannelStatistics& call, int device, void* stream) {
  QuantiseTilesParams params{};
  if (const std::string error = make_params(params, call); !error.empty()) return error;
  bool found = true;
  const auto launch = [&](cudaStream_t stream) {
    cudaError_t error = cudaMemsetAsync(call.records, 0, record_bytes(call), stream);
    if (error != cudaSuccess) return error;
    found = with_statistics(
        call, [&](auto kernel) { error = launch_warps<decltype(kernel)>(params, stream); });
    return error;
  };
  const std::string error = launch_on(device, stream, "the kernel of channel statistics", launch);
  return found ? error : kNoConfig;
}

std::string quantise_tiles(const QuantiseTiles& call, int device, void* stream) {
  QuantiseTilesParams params{};
  if (const std::string error = make_params(params, call); !error.empty()) return error;
  bool found = true;
  const auto launch = [&](cudaStream_t stream) {
    cudaError_t error = cudaSuccess;
    found = with_quantisation(
        call, [&](auto kernel) { error = launch_warps<decltype(kernel)>(params, stream); });
    return error;
  };
  const std::string error = launch_on(device, stream, "the kernel that quantises tiles", launch);
  return found ? error : kNoConfig;
}

}  // namespace vsa::launch
