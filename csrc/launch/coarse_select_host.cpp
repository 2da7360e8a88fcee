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

std::string softmax_rows_emulated(const SoftmaxRows& call) {
  for (int row = 0; row < call.rows; ++row)
    vsa::SoftmaxRows::run({call.scores, call.rows, call.columns}, row);
  return "";
}

}  // namespace vsa::launch
