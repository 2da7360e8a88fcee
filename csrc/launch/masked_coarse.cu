// SPDX-License-Identifier: Apache-2.0
// The kernels of means, selection and products under a mask over tiles on a GPU.
#include "launch/cuda_launch.h"
#include "launch/masked_coarse_params.h"
#include "prim/sm90_block.h"

namespace vsa::launch {
namespace {

constexpr int kMeansThreads = 128;
constexpr int kSoftmaxThreads = 128;
constexpr int kSelectWarps = kSelectThreads / kWarpThreads;
constexpr int kBlocksPerSm = 2;  // of products: while one makes its pieces, another multiplies

template <class Kernel>
__global__ void __launch_bounds__(kMeansThreads)
    masked_means_kernel(const __grid_constant__ MaskedTileMeansParams params) {
  const int tensor = static_cast<int>(blockIdx.y);
  const int64_t lane = int64_t{blockIdx.x} * kMeansThreads + threadIdx.x;
  if (lane < params.tensors[tensor].lanes) Kernel::run(params, tensor, lane);
}

template <class Kernel>
__global__ void __launch_bounds__(kSelectThreads, Kernel::kBlocksPerSm)
    masked_select_kernel(const __grid_constant__ MaskedSelectParams params) {
  // Through a shuffle, so that the compiler knows it to be the same for the whole warp.
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpThreads, 0);
  const int row = static_cast<int>(blockIdx.x) * kSelectWarps + warp;
  if (row < params.rows) Kernel::run(params, row);
}

template <class Kernel>
__global__ void __launch_bounds__(kSoftmaxThreads)
    masked_softmax_kernel(const __grid_constant__ MaskedSoftmaxRowsParams params) {
  const int row = static_cast<int>(blockIdx.x * kSoftmaxThreads + threadIdx.x) / kWarpThreads;
  if (row < params.rows) Kernel::run(params, row);
}

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, kBlocksPerSm)
    masked_product_kernel(const __grid_constant__ MaskedProductParams params) {
  run_warpgroup<Kernel>(params);
}

unsigned blocks(int64_t items, int per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

template <class Kernel, class Call>
std::string run(const Call& call, const char* what, int device, void* stream) {
  constexpr int kBytes = sizeof(typename Kernel::SharedMemory);
  static_assert(kBytes <= 48 * 1024, "what a launch may ask for without more ado");
  MaskedProductParams params;
  if (const std::string error = make_params(params, call); !error.empty()) return error;
  return launch_on(device, stream, what, [&](cudaStream_t stream) {
    masked_product_kernel<Kernel>
        <<<num_blocks(call, params), Kernel::kThreads, kBytes, stream>>>(params);
    return cudaGetLastError();
  });
}

}  // namespace

std::string masked_tile_means(const MaskedTileMeans& call, int device, void* stream) {
  MaskedTileMeansParams params;
  if (const std::string error = make_params(params, call); !error.empty()) return error;
  int64_t most = 0;
  for (int tensor = 0; tensor < params.count; ++tensor)
    most = std::max(most, params.tensors[tensor].lanes);
  const dim3 grid(blocks(most, kMeansThreads), static_cast<unsigned>(params.count));
  return launch_on(device, stream, "the kernel of masked tile means", [&](cudaStream_t stream) {
    with_masked_means(call, [&](auto kernel) {
      masked_means_kernel<decltype(kernel)><<<grid, kMeansThreads, 0, stream>>>(params);
    });
    return cudaGetLastError();
  });
}

std::string masked_select_tiles(const MaskedSelectTiles& call, int device, void* stream) {
  static_assert(sizeof(MaskedSelectParams) <= 4096, "the most that a launch may pass");
  MaskedSelectParams params;
  if (const std::string error = make_params(params, call); !error.empty()) return error;
  const unsigned grid = blocks(params.rows, kSelectWarps);
  return launch_on(device, stream, "the kernel that selects under a mask",
                   [&](cudaStream_t stream) {
                     with_masked_selection(params, [&]<class Kernel>() {
                       masked_select_kernel<Kernel><<<grid, kSelectThreads, 0, stream>>>(params);
                     });
                     return cudaGetLastError();
                   });
}

std::string masked_softmax_rows(const MaskedSoftmaxRows& call, int device, void* stream) {
  MaskedSoftmaxRowsParams params;
  if (const std::string error = make_params(params, call); !error.empty()) return error;
  const unsigned grid = blocks(params.rows, kSoftmaxThreads / kWarpThreads);
  return launch_on(device, stream, "the kernel of the masked softmax", [&](cudaStream_t stream) {
    with_masked_softmax(params, [&]<class Kernel>() {
      masked_softmax_kernel<Kernel><<<grid, kSoftmaxThreads, 0, stream>>>(params);
    });
    return cudaGetLastError();
  });
}

std::string masked_multiply(const MaskedProducts& call, int device, void* stream) {
  return run<FloatProduct<false, true>>(call, "the kernel of masked products", device, stream);
}

std::string masked_score_gradient(const MaskedScoreGradient& call, int device, void* stream) {
  return run<FloatProduct<true, true>>(call, "the kernel of the masked scores' gradient", device,
                                       stream);
}

}  // namespace vsa::launch
