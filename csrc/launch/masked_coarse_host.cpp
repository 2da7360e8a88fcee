// SPDX-License-Identifier: Apache-2.0
// The source of the kernels under a mask over tiles on a CPU: lane after lane, row after row, and
// products block after block on the emulator.
#include <exception>

#include "launch/masked_coarse_params.h"
#include "prim/host_block.h"

namespace vsa::launch {
namespace {

template <class Kernel, class Call>
std::string run(const Call& call, unsigned seed) {
  MaskedProductParams params;
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

std::string masked_tile_means_emulated(const MaskedTileMeans& call) {
  MaskedTileMeansParams params;
  if (const std::string error = make_params(params, call); !error.empty()) return error;
  with_masked_means(call, [&](auto kernel) {
    for (int tensor = 0; tensor < params.count; ++tensor)
      for (int64_t lane = 0; lane < params.tensors[tensor].lanes; ++lane)
        kernel.run(params, tensor, lane);
  });
  return "";
}

std::string masked_select_tiles_emulated(const MaskedSelectTiles& call) {
  MaskedSelectParams params;
  if (const std::string error = make_params(params, call); !error.empty()) return error;
  with_masked_selection(params, [&]<class Kernel>() {
    for (int row = 0; row < params.rows; ++row) Kernel::run(params, row);
  });
  return "";
}

std::string masked_softmax_rows_emulated(const MaskedSoftmaxRows& call) {
  MaskedSoftmaxRowsParams params;
  if (const std::string error = make_params(params, call); !error.empty()) return error;
  with_masked_softmax(params, [&]<class Kernel>() {
    for (int row = 0; row < params.rows; ++row) Kernel::run(params, row);
  });
  return "";
}

std::string masked_multiply_emulated(const MaskedProducts& call, int, unsigned seed) {
  return run<FloatProduct<false, true>>(call, seed);
}

std::string masked_score_gradient_emulated(const MaskedScoreGradient& call, int, unsigned seed) {
  return run<FloatProduct<true, true>>(call, seed);
}

}  // namespace vsa::launch
