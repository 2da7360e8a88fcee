// SPDX-License-Identifier: Apache-2.0
// The kernels of low precision on a CPU.
#include <cstring>

#include "launch/emulated_blocks.h"
#include "launch/emulated_map.h"
#include "launch/low_precision_params.h"

namespace vsa::launch {
namespace {

template <class Kernel>
void run_warps(Kernel kernel, const QuantiseTilesParams& params) {
  for (int64_t warp = 0; warp < kernel.warps(params); ++warp) kernel.run(params, warp);
}

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

int low_precision_work_tiles(int head_dim, int tiles) {
  const auto of = [&](auto config) { return ceil_div(tiles, decltype(config)::kConsumers); };
  return head_dim == 64 ? of(LowPrecisionForwardConfig<Bf16, 64>{})
                        : of(LowPrecisionForwardConfig<Bf16, 128>{});
}

std::string channel_statistics_emulated(const ChannelStatistics& call) {
  QuantiseTilesParams params{};
  if (const std::string error = make_params(params, call); !error.empty()) return error;
  std::memset(call.records, 0, record_bytes(call));
  const auto run = [&](auto kernel) { run_warps(kernel, params); };
  return with_statistics(call, run) ? "" : kNoConfig;
}

std::string quantise_tiles_emulated(const QuantiseTiles& call) {
  QuantiseTilesParams params{};
  if (const std::string error = make_params(params, call); !error.empty()) return error;
  const auto run = [&](auto kernel) { run_warps(kernel, params); };
  return with_quantisation(call, run) ? "" : kNoConfig;
}

std::string low_precision_forward_emulated(const LowPrecisionForward& call,
                                           int blocks,
                                           unsigned seed) {
  return any(call.gates) ? emulate_forward<GatedOutput>(call, blocks, seed)
                         : emulate_forward<PlainOutput>(call, blocks, seed);
}

}  // namespace vsa::launch
