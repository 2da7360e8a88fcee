// SPDX-License-Identifier: Apache-2.0
// The kernels of means and selection on a GPU: one lane per vector of means, one warp per row
// of scores.
#include "launch/coarse_select_params.h"
#include "launch/cuda_launch.h"

namespace vsa::launch {
namespace {

constexpr int kMeansThreads = 128;
constexpr int kSoftmaxThreads = 128;
constexpr int kSelectWarps = kSelectThreads / kWarpThreads;

template <class Kernel>
__global__ void __launch_bounds__(kMeansThreads)
    tile_means_kernel(const __grid_constant__ TileMeansParams params) {
  const int tensor = static_cast<int>(blockIdx.y);
  const int64_t lane = int64_t{blockIdx.x} * kMeansThreads + threadIdx.x;
  if (lane < params.tensors[tensor].lanes) Kernel::run(params, tensor, lane);
}

template <class Kernel>
__global__ void __launch_bounds__(kSelectThreads, Kernel::kBlocksPerSm)
    select_tiles_kernel(const __grid_constant__ SelectTilesParams params) {
  // Through a shuffle, so that the compiler knows it to be the same for the whole warp.
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpThreads, 0);
  const int row = static_cast<int>(blockIdx.x) * kSelectWarps + warp;
  if (row < params.rows) Kernel::run(params, row);
}

__global__ void __launch_bounds__(kSoftmaxThreads)
    softmax_rows_kernel(const __grid_constant__ SoftmaxRowsParams params) {
  const int row = static_cast<int>(blockIdx.x * kSoftmaxThreads + threadIdx.x) / kWarpThreads;
  if (row < params.rows) vsa::SoftmaxRows::run(params, row);
}

unsigned blocks(int64_t items, int per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

}  // namespace

std::string tile_means(const TileMeans& call, int device, void* stream) {
  TileMeansParams params;
  if (const std::string error = make_params(params, call); !error.empty()) return error;
  int64_t most = 0;
  for (int tensor = 0; tensor < params.count; ++tensor)
    most = std::max(most, params.tensors[tensor].lanes);
  const dim3 grid(blocks(most, kMeansThreads), static_cast<unsigned>(params.count));
  return launch_on(device, stream, "the kernel of tile means", [&](cudaStream_t stream) {
    with_means(call, [&](auto kernel) {
      tile_means_kernel<decltype(kernel)><<<grid, kMeansThreads, 0, stream>>>(params);
    });
    return cudaGetLastError();
  });
}

std::string select_tiles(const SelectTiles& call, int device, void* stream) {
  SelectTilesParams params;
  if (const std::string error = make_params(params, call); !error.empty()) return error;
  const unsigned grid = blocks(params.rows, kSelectWarps);
  return launch_on(device, stream, "the kernel that selects tiles", [&](cudaStream_t stream) {
    with_selection(call, [&]<class Kernel>() {
      select_tiles_kernel<Kernel><<<grid, kSelectThreads, 0, stream>>>(params);
    });
    return cudaGetLastError();
  });
}

std::string softmax_rows(const SoftmaxRows& call, int device, void* stream) {
  const SoftmaxRowsParams params = {call.scores, call.rows, call.columns};
  const unsigned grid = blocks(params.rows, kSoftmaxThreads / kWarpThreads);
  return launch_on(device, stream, "the kernel of the softmax", [&](cudaStream_t stream) {
    softmax_rows_kernel<<<grid, kSoftmaxThreads, 0, stream>>>(params);
    return cudaGetLastError();
  });
}

}  // namespace vsa::launch
