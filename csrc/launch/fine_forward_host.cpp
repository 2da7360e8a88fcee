// SPDX-License-Identifier: Apache-2.0
// The forward kernel on the emulator: the blocks of a persistent grid, one after the other.
#include <exception>

#include "launch/fine_params.h"
#include "prim/host_block.h"

namespace vsa::launch {

std::string fine_forward_emulated(const FineForward& call, int blocks, unsigned seed) {
  FineForwardParams params;
  const auto encode = [](TensorMap& map, const MapArguments& a) {
    map = {a.base, {}, {}, {}};
    std::copy(std::begin(a.dims), std::end(a.dims), map.dims);
    std::copy(std::begin(a.strides), std::end(a.strides), map.strides);
    std::copy(std::begin(a.box), std::end(a.box), map.box);
    return std::string();
  };
  if (const std::string error = make_params(params, call, encode); !error.empty()) return error;
  std::string error;
  const bool found = with_config(call, [&](auto config) {
    try {
      for (int block = 0; block < blocks; ++block)
        host::run_block<vsa::FineForward<decltype(config)>>(params, block, blocks, seed + block);
    } catch (const std::exception& hazard) {
      error = hazard.what();
    }
  });
  return found ? error : kNoConfig;
}

}  // namespace vsa::launch
