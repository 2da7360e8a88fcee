// SPDX-License-Identifier: Apache-2.0
// The kernels of runs on a GPU: one warp per tile and head for their means, a block for every group
// of rows and part of the keys for scores.
#include <atomic>

#include "launch/cuda_launch.h"
#include "launch/sub_blocks_params.h"
#include "prim/sm90_block.h"

namespace vsa::launch {
namespace {

constexpr int kMeansThreads = 128;
constexpr int kMostDevices = 64;

template <class Kernel>
__global__ void __launch_bounds__(kMeansThreads)
    run_means_kernel(const __grid_constant__ RunMeansParams params) {
  // Through a shuffle, so that the compiler knows it to be the same for the whole warp.
  const int in_block = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpThreads, 0);
  const int64_t warp = int64_t{blockIdx.x} * (kMeansThreads / kWarpThreads) + in_block;
  const int tensor = static_cast<int>(blockIdx.y);
  if (warp < params.tensors[tensor].warps) Kernel::run(params, tensor, warp);
}

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, 1)
    sub_block_scores_kernel(const __grid_constant__ SubBlockScoresParams params) {
  run_kernel<Kernel>(params);
}

template <class Kernel>
cudaError_t launch_scores(const SubBlockScoresParams& params,
                          int blocks,
                          int device,
                          cudaStream_t stream) {
  constexpr int kBytes = sizeof(typename Kernel::SharedMemory);
  static std::atomic<bool> allowed[kMostDevices];  // the memory, which is asked for once
  if (device >= kMostDevices || !allowed[device].load()) {
    const cudaError_t error = cudaFuncSetAttribute(
        sub_block_scores_kernel<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    if (error != cudaSuccess) return error;
    if (device < kMostDevices) allowed[device].store(true);
  }
  sub_block_scores_kernel<Kernel><<<blocks, Kernel::kThreads, kBytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace

std::string run_means(const RunMeans& call, int device, void* stream) {
  RunMeansParams params;
  if (const std::string error = make_params(params, call); !error.empty()) return error;
  int64_t most = 0;
  for (int tensor = 0; tensor < params.count; ++tensor)
    most = std::max(most, params.tensors[tensor].warps);
  constexpr int kWarps = kMeansThreads / kWarpThreads;
  const dim3 grid(static_cast<unsigned>((most + kWarps - 1) / kWarps),
                  static_cast<unsigned>(params.count));
  return launch_on(device, stream, "the kernel of means of runs", [&](cudaStream_t stream) {
    with_run_means(call, [&]<class Kernel>(Kernel*) {
      run_means_kernel<Kernel><<<grid, kMeansThreads, 0, stream>>>(params);
    });
    return cudaGetLastError();
  });
}

std::string sub_block_scores(const SubBlockScores& call, int device, void* stream) {
  std::string error;
  with_sub_block_scores(call, [&]<class Kernel>() {
    SubBlockScoresParams params;
    error = make_params<Kernel>(params, call);
    if (!error.empty()) return;
    error = launch_on(device, stream, "the kernel of scores of runs", [&](cudaStream_t stream) {
      return launch_scores<Kernel>(params, num_blocks(call, params), device, stream);
    });
  });
  return error;
}

}  // namespace vsa::launch
