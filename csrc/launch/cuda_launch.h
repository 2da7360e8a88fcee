// SPDX-License-Identifier: Apache-2.0
// What every .cu file of this folder shares: the architecture, the device and its errors.
#pragma once
#include <cuda_runtime.h>

#include <string>

// Kernels of this project use instructions that only sm_90a has; built for anything else they would
// compile to traps and fail far from the cause.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "vsa's kernels are for sm_90a: build with CMAKE_CUDA_ARCHITECTURES=90a-real"
#endif

namespace vsa::launch {

// "what: the runtime's reason", or the empty string.
inline std::string sentence(const std::string& what, cudaError_t error) {
  return error == cudaSuccess ? "" : what + ": " + cudaGetErrorString(error);
}

// launch(stream) -> cudaError_t while `device` is the current one; afterwards the caller's is
// again.
template <class Launch>
std::string launch_on(int device, void* stream, const char* what, Launch launch) {
  int callers = 0;
  cudaError_t error = cudaGetDevice(&callers);
  if (error == cudaSuccess && device != callers) error = cudaSetDevice(device);
  if (error == cudaSuccess) error = launch(static_cast<cudaStream_t>(stream));
  if (device != callers) cudaSetDevice(callers);
  return sentence(std::string(what) + " was not launched", error);
}

}  // namespace vsa::launch
