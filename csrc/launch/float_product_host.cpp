// SPDX-License-Identifier: Apache-2.0
// The kernel of fp32 products on the emulator, block after block.
#include <exception>

#include "launch/float_product_params.h"
#include "prim/host_block.h"

namespace vsa::launch {
namespace {

template <class Kernel, class Call>
std::string run(const Call& call, unsigned seed) {
  FloatProductParams params;
  if (const std::string error = make_params(params, call); !error.empty()) return error;
  const int blocks = num_blocks(call, params);
  try {
    for (int block = 0; block < blocks; ++block)
      host::run_warpgroup_block<Kernel>(params, block, blocks, seed + block);
  } catch (const std::exception& hazard) {
    return hazard.what();
  }
  return "";
}

}  // namespace

std::string multiply_emulated(const Products& call, int, unsigned seed) {
  return run<FloatProduct<false>>(call, seed);
}

std::string score_gradient_emulated(const ScoreGradient& call, int, unsigned seed) {
  return run<FloatProduct<true>>(call, seed);
}

}  // namespace vsa::launch
