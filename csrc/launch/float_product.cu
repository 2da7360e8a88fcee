// SPDX-License-Identifier: Apache-2.0
// The kernel of fp32 products on a GPU: a block for every 64 x 64 results.
#include "launch/cuda_launch.h"
#include "launch/float_product_params.h"
#include "prim/sm90_block.h"

namespace vsa::launch {
namespace {

constexpr int kBlocksPerSm = 2;  // while one makes its pieces, another multiplies

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, kBlocksPerSm)
    float_product_kernel(const __grid_constant__ FloatProductParams params) {
  run_warpgroup<Kernel>(params);
}

template <class Kernel, class Call>
std::string run(const Call& call, const char* what, int device, void* stream) {
  constexpr int kBytes = sizeof(typename Kernel::SharedMemory);
  static_assert(kBytes <= 48 * 1024, "what a launch may ask for without more ado");
  FloatProductParams params;
  if (const std::string error = make_params(params, call); !error.empty()) return error;
  return launch_on(device, stream, what, [&](cudaStream_t stream) {
    float_product_kernel<Kernel>
        <<<num_blocks(call, params), Kernel::kThreads, kBytes, stream>>>(params);
    return cudaGetLastError();
  });
}

}  // namespace

std::string multiply(const Products& call, int device, void* stream) {
  return run<FloatProduct<false>>(call, "the kernel of fp32 products", device, stream);
}

std::string score_gradient(const ScoreGradient& call, int device, void* stream) {
  return run<FloatProduct<true>>(call, "the kernel of the scores' gradient", device, stream);
}

}  // namespace vsa::launch
