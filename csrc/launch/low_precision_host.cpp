// SPDX-License-Identifier: Apache-2.0
// The kernels of low precision on a CPU.
#include <cstring>

#include "launch/emulated_blocks.h"
#include "launch/emulated_map.h"
#include "launch/low_precision_params.h"

namespace vsa::launch {
namespace {

template <class Epilogue>
std::string emulate_forward(const LowPrecisionForward& call, int blocks, unsigned seed) {
  LowPrecisionParams<typename Epilogue::Params> params;
  if (const std::string error = make_params(params, call, encode_for_emulator); !error.empty())
    return error;
  try {
    const bool found = with_low_precision(call, [&](auto config) {
      run_blocks<vsa::LowPrecisionForward<decltype(config), Epilogue>>(params, blocks, seed);
    });
    return found ? "" : kNoConfig;
  } catch (const std::exception& hazard) {
    return hazard.what();
  }
}

}  // namespace

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

std::string low_precision_forward_emulated(const LowPrecisionForward& call,
                                           int blocks,
                                           unsigned seed) {
  return any(call.gates) ? emulate_forward<GatedOutput>(call, blocks, seed)
                         : emulate_forward<PlainOutput>(call, blocks, seed);
}

}  // namespace vsa::launch
