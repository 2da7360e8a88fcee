// SPDX-License-Identifier: Apache-2.0
// The kernels of low precision on a CPU.
#include <cstring>

#include "launch/low_precision_params.h"

namespace vsa::launch {

std::string quantise_tiles_emulated(const QuantiseTiles& call) {
  QuantiseTilesParams params;
  if (const std::string error = make_params(params, call); !error.empty()) return error;
  std::memset(call.records, 0, record_bytes(call));
  const auto run_all = [&](auto kernel) {
    for (int64_t warp = 0; warp < kernel.warps(params); ++warp) kernel.run(params, warp);
  };
  const bool found = with_quantisation(call, [&](auto first, auto second) {
    run_all(first);
    run_all(second);
  });
  return found ? "" : kNoConfig;
}

}  // namespace vsa::launch
