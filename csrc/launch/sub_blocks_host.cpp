// SPDX-License-Identifier: Apache-2.0
// The kernels of runs on a CPU: means warp after warp, scores on the emulator, block after block.
#include <exception>

#include "launch/sub_blocks_params.h"
#include "prim/host_block.h"

namespace vsa::launch {

std::string run_means_emulated(const RunMeans& call) {
  RunMeansParams params;
  if (const std::string error = make_params(params, call); !error.empty()) return error;
  with_run_means(call, [&]<class Kernel>(Kernel*) {
    for (int tensor = 0; tensor < params.count; ++tensor)
      for (int64_t warp = 0; warp < params.tensors[tensor].warps; ++warp)
        Kernel::run(params, tensor, warp);
  });
  return "";
}

std::string sub_block_scores_emulated(const SubBlockScores& call, int, unsigned seed) {
  std::string error;
  with_sub_block_scores(call, [&]<class Kernel>() {
    SubBlockScoresParams params;
    error = make_params<Kernel>(params, call);
    if (!error.empty()) return;
    const int blocks = num_blocks(call, params);
    try {
      for (int block = 0; block < blocks; ++block)
        host::run_block<Kernel>(params, block, blocks, seed + static_cast<unsigned>(block));
    } catch (const std::exception& hazard) {
      error = hazard.what();
    }
  });
  return error;
}

}  // namespace vsa::launch
