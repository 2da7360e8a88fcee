// SPDX-License-Identifier: Apache-2.0
// The kernels of the tail on the emulator, and those without products on the CPU itself.
#include <exception>

#include "launch/emulated_map.h"
#include "launch/tail_params.h"
#include "prim/host_block.h"

namespace vsa::launch {
namespace {

// Blocks one after the other; hazards that they throw as sentences.
template <class Kernel>
std::string run_blocks(const typename Kernel::Params& params, int blocks, unsigned seed) {
  try {
    for (int block = 0; block < blocks; ++block)
      host::run_block<Kernel>(params, block, blocks, seed + block);
  } catch (const std::exception& hazard) {
    return hazard.what();
  }
  return "";
}

template <class Epilogue>
std::string emulate_forward(const TailForward& call, int blocks, unsigned seed) {
  TailForwardParams<typename Epilogue::Params> params;
  std::string error = make_params(params, call, encode_for_emulator);
  if (!error.empty()) return error;
  const bool found = with_config(call, [&](auto element, auto head_dim) {
    using Config = TailForwardConfig<decltype(element), head_dim()>;
    error = run_blocks<vsa::TailForward<Config, Epilogue>>(params, blocks, seed);
  });
  return found ? error : kNoConfig;
}

template <template <class> class Kernel, template <class, int> class Config>
std::string emulate_backward(const TailBackward& call, int blocks, unsigned seed) {
  TailBackwardParams params;
  std::string error = make_params(params, call, encode_for_emulator);
  if (!error.empty()) return error;
  const bool found = with_config(call, [&](auto element, auto head_dim) {
    error = run_blocks<Kernel<Config<decltype(element), head_dim()>>>(params, blocks, seed);
  });
  return found ? error : kNoConfig;
}

}  // namespace

std::string round_means_emulated(const RoundMeans& call) {
  const RoundMeansParams params = round_means_params(call);
  const bool found = with_element(call.dtype, FineDtypes{}, [&](auto element) {
    for (int64_t lane = 0; lane < lanes(params); ++lane)
      vsa::RoundMeans<decltype(element)>::run(params, lane);
  });
  return found ? "" : kNoConfig;
}

std::string tail_forward_emulated(const TailForward& call, int blocks, unsigned seed) {
  return any(call.gates) ? emulate_forward<GatedOutput>(call, blocks, seed)
                         : emulate_forward<PlainOutput>(call, blocks, seed);
}

std::string tail_means_emulated(const TailBackward& call, int blocks, unsigned seed) {
  const std::string error =
      emulate_backward<TailBackwardMeans, TailBackwardMeansConfig>(call, blocks, seed);
  if (!error.empty()) return error;
  const SumPartsParams sums = sum_parts_params(call);
  for (int64_t lane = 0; lane < sums.numbers; ++lane) SumPartsParams::run(sums, lane);
  return "";
}

std::string tail_queries_emulated(const TailBackward& call, int blocks, unsigned seed) {
  return emulate_backward<TailBackwardQueries, TailBackwardQueriesConfig>(call, blocks, seed);
}

}  // namespace vsa::launch
