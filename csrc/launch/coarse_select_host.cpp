// SPDX-License-Identifier: Apache-2.0
// The source of the kernels of means and selection on a CPU, lane after lane and row after row.
#include "launch/coarse_select_params.h"

namespace vsa::launch {

std::string tile_means_emulated(const TileMeans& call) {
  TileMeansParams params;
  if (const std::string error = make_params(params, call); !error.empty()) return error;
  with_means(call, [&](auto kernel) {
    for (int tensor = 0; tensor < params.count; ++tensor)
      for (int64_t lane = 0; lane < params.tensors[tensor].lanes; ++lane)
        kernel.run(params, tensor, lane);
  });
  return "";
}

std::string select_tiles_emulated(const SelectTiles& call) {
  SelectTilesParams params;
  if (const std::string error = make_params(params, call); !error.empty()) return error;
  with_selection(call, [&]<class Kernel>() {
    for (int row = 0; row < params.rows; ++row) Kernel::run(params, row);
  });
  return "";
}

std::string split_operands_emulated(const SplitOperands& call) {
  SplitOperandsParams params;
  if (const std::string error = make_params(params, call); !error.empty()) return error;
  for (int operand = 0; operand < 2; ++operand)
    for (int i = 0; i < params.operands[operand].count; ++i)
      vsa::SplitOperands::run(params, operand, i);
  return "";
}

}  // namespace vsa::launch
