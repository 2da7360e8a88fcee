// SPDX-License-Identifier: Apache-2.0
// What kernels with matrix products need: tensor maps from the driver, and persistent grids.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <string>

#include "launch/cuda_launch.h"
#include "launch/tensor_map.h"
#include "prim/sm90_block.h"

namespace vsa::launch {

// Through the runtime, so that nothing links to the driver.
inline std::string encode(TensorMap& map, const MapArguments& a) {
  static const auto function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                     &result);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  if (function == nullptr) return "the driver has no cuTensorMapEncodeTiled";
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  const CUresult result = function(
      reinterpret_cast<CUtensorMap*>(&map), CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 5, a.base, a.dims,
      a.strides, a.box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return "";
  return "the driver refuses its tensor map with error " + std::to_string(result);
}

constexpr int kMostDevices = 64;

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, 1)
    persistent_kernel(const __grid_constant__ typename Kernel::Params params) {
  run_kernel<Kernel>(params);
}

// How many multiprocessors a device has, and leave for a kernel to use that much shared memory.
template <class Kernel>
cudaError_t prepare(int device, int bytes, int& multiprocessors) {
  // What a device has and what the kernel may use are asked and said once, 0 for not yet.
  static std::atomic<int> known[kMostDevices];
  multiprocessors = device < kMostDevices ? known[device].load() : 0;
  if (multiprocessors != 0) return cudaSuccess;
  cudaError_t error =
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(persistent_kernel<Kernel>,
                               cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess && device < kMostDevices) known[device].store(multiprocessors);
  return error;
}

// One block per multiprocessor, or per work tile where those are fewer: groups of
// Kernel::kConsumers tiles of `sequence`, for each of `heads` of all batch elements.
template <class Kernel>
cudaError_t launch_persistent(const typename Kernel::Params& params,
                              const TiledSequence& sequence,
                              int heads,
                              int device,
                              cudaStream_t stream) {
  constexpr int kBytes = sizeof(typename Kernel::SharedMemory);
  int multiprocessors = 0;
  const cudaError_t error = prepare<Kernel>(device, kBytes, multiprocessors);
  if (error != cudaSuccess) return error;
  const int work_tiles =
      params.batch * heads *
      ceil_div(sequence.grid.num_tiles() + sequence.text_tiles, Kernel::kConsumers);
  persistent_kernel<Kernel>
      <<<std::min(work_tiles, multiprocessors), Kernel::kThreads, kBytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace vsa::launch
