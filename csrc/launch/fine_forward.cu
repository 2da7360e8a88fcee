// SPDX-License-Identifier: Apache-2.0
// The forward kernel on a GPU: tensor maps are made and the persistent grid is launched.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "launch/fine_params.h"
#include "prim/sm90_block.h"

#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "vsa's kernels are for sm_90a: build with CMAKE_CUDA_ARCHITECTURES=90a-real"
#endif

namespace vsa::launch {
namespace {

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, 1)
    fine_forward_kernel(const __grid_constant__ FineForwardParams params) {
  run_kernel<Kernel>(params);
}

// Through the runtime, so that nothing links to the driver.
std::string encode(TensorMap& map, const MapArguments& a) {
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

template <class Kernel>
cudaError_t launch(const FineForwardParams& params, int device, cudaStream_t stream) {
  constexpr int kBytes = sizeof(typename Kernel::SharedMemory);
  int multiprocessors = 0;
  cudaError_t error =
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(fine_forward_kernel<Kernel>,
                               cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const int items =
      params.batch * params.heads *
      ceil_div(params.queries.grid.num_tiles() + params.queries.text_tiles, Kernel::kConsumers);
  fine_forward_kernel<Kernel>
      <<<std::min(items, multiprocessors), Kernel::kThreads, kBytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace

std::string fine_forward(const FineForward& call, int device, void* stream) {
  FineForwardParams params{};
  if (const std::string error = make_params(params, call, encode); !error.empty()) return error;
  cudaError_t error = cudaSuccess;
  const bool found = with_config(call, [&](auto config) {
    error = launch<vsa::FineForward<decltype(config)>>(params, device,
                                                       static_cast<cudaStream_t>(stream));
  });
  if (!found) return kNoConfig;
  if (error == cudaSuccess) return "";
  return std::string("the forward kernel was not launched: ") + cudaGetErrorString(error);
}

}  // namespace vsa::launch
