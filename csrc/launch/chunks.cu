// SPDX-License-Identifier: Apache-2.0
// The kernels of a video that comes chunk by chunk on a GPU: one lane per vector of means, one per
// word of a bitmap.
#include "launch/chunks_params.h"
#include "launch/cuda_launch.h"

namespace vsa::launch {
namespace {

constexpr int kThreads = 128;

template <class Kernel>
__global__ void __launch_bounds__(kThreads)
    chunk_means_kernel(const __grid_constant__ ChunkMeansParams params) {
  const int tensor = static_cast<int>(blockIdx.y);
  const int64_t lane = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (lane < params.tensors[tensor].lanes) Kernel::run(params, tensor, lane);
}

template <class Kernel>
__global__ void __launch_bounds__(kThreads)
    chunk_text_kernel(const __grid_constant__ ChunkMeansParams params) {
  const int tensor = static_cast<int>(blockIdx.y);
  const int lane = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (lane < params.slots[tensor].text_lanes) Kernel::copy_text(params, tensor, lane);
}

__global__ void __launch_bounds__(kThreads)
    reorder_bitmap_kernel(const __grid_constant__ ReorderBitmapParams params) {
  const int64_t lane = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (lane < params.lanes) vsa::ReorderBitmap::run(params, lane);
}

unsigned blocks(int64_t lanes) { return static_cast<unsigned>((lanes + kThreads - 1) / kThreads); }

}  // namespace

std::string chunk_means(const ChunkMeans& call, int device, void* stream) {
  static_assert(sizeof(ChunkMeansParams) <= 4096, "the most that a launch may pass");
  ChunkMeansParams params;
  if (const std::string error = make_params(params, call); !error.empty()) return error;
  int64_t most = 0, text = 0;
  for (int tensor = 0; tensor < params.count; ++tensor) {
    most = std::max(most, params.tensors[tensor].lanes);
    text = std::max(text, params.slots[tensor].text_lanes);
  }
  const auto grid = [&](int64_t lanes) {
    return dim3(blocks(lanes), static_cast<unsigned>(params.count));
  };
  return launch_on(device, stream, "the kernel of a chunk's means", [&](cudaStream_t stream) {
    with_chunk_means(call, [&](auto kernel) {
      using Kernel = decltype(kernel);
      chunk_means_kernel<Kernel><<<grid(most), kThreads, 0, stream>>>(params);
      if (text > 0) chunk_text_kernel<Kernel><<<grid(text), kThreads, 0, stream>>>(params);
    });
    return cudaGetLastError();
  });
}

std::string reorder_bitmap(const ReorderBitmap& call, int device, void* stream) {
  ReorderBitmapParams params;
  if (const std::string error = make_params(params, call); !error.empty()) return error;
  return launch_on(device, stream, "the kernel of chunks in order", [&](cudaStream_t stream) {
    reorder_bitmap_kernel<<<blocks(params.lanes), kThreads, 0, stream>>>(params);
    return cudaGetLastError();
  });
}

}  // namespace vsa::launch
