// SPDX-License-Identifier: Apache-2.0
// The test kernels for the GPU. Compiled, never run: ptxas's report is what the test reads.
#include "attention.h"
#include "prim/sm90_block.h"
#include "products.h"
#include "products8.h"

namespace vsa::test {

#define VSA_TEST_KERNEL(name, ...)                                       \
  extern "C" __global__ void __launch_bounds__(__VA_ARGS__::kThreads, 1) \
      name(const __grid_constant__ __VA_ARGS__::Params params) {         \
    run_kernel<__VA_ARGS__>(params);                                     \
  }

VSA_TEST_KERNEL(attention_bf16_64, Attention<Bf16, 64>)
VSA_TEST_KERNEL(attention_bf16_128, Attention<Bf16, 128>)
VSA_TEST_KERNEL(attention_fp16_64, Attention<Fp16, 64>)
VSA_TEST_KERNEL(attention_fp16_128, Attention<Fp16, 128>)
VSA_TEST_KERNEL(products_bf16_64, Products<Bf16, 64>)
VSA_TEST_KERNEL(products_fp16_128, Products<Fp16, 128>)
VSA_TEST_KERNEL(products_s8_64, Products8<S8, 64, int>)
VSA_TEST_KERNEL(products_s8_128, Products8<S8, 128, int>)
VSA_TEST_KERNEL(products_e4m3_64, Products8<E4m3, 64, float>)
VSA_TEST_KERNEL(products_e4m3_128, Products8<E4m3, 128, float>)
VSA_TEST_KERNEL(products_half_128, Products8<E4m3, 128, Fp16>)

#undef VSA_TEST_KERNEL

}  // namespace vsa::test
