// SPDX-License-Identifier: Apache-2.0
// Kernels of a persistent grid on the emulator.
#pragma once
#include <exception>
#include <string>

#include "launch/fine_params.h"
#include "prim/host_block.h"

namespace vsa::launch {

// Its blocks, one after the other.
template <class Kernel>
void run_blocks(const typename Kernel::Params& params, int blocks, unsigned seed) {
  for (int block = 0; block < blocks; ++block)
    host::run_block<Kernel>(params, block, blocks, seed + block);
}

// fn(Element{}, head_dim), with the hazards that it throws as sentences
template <class Call, class Fn>
std::string with_hazards(const Call& call, Fn fn) {
  try {
    return with_config(call, fn) ? "" : kNoConfig;
  } catch (const std::exception& hazard) {
    return hazard.what();
  }
}

}  // namespace vsa::launch
