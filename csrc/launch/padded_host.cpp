// SPDX-License-Identifier: Apache-2.0
// The source of the kernels of padded tiles on a CPU, row after row.
#include <exception>

#include "launch/padded_params.h"
#include "prim/host_block.h"

namespace vsa::launch {
namespace {

// fn(row), with the hazards that it throws as sentences.
template <class Fn>
std::string each_row(int rows, Fn fn) {
  try {
    for (int row = 0; row < rows; ++row) fn(row);
  } catch (const std::exception& hazard) {
    return hazard.what();
  }
  return "";
}

}  // namespace

std::string keep_tiles_emulated(const KeptTiles& call) {
  KeptTilesParams params;
  if (const std::string error = make_params(params, call); !error.empty()) return error;
  return each_row(params.rows, [&](int row) { vsa::KeptTiles::run(params, row); });
}

std::string hide_empty_emulated(const HideEmpty& call) {
  const HideEmptyParams params = params_of(call);
  return each_row(params.rows, [&](int row) { vsa::HideEmpty::run(params, row); });
}

}  // namespace vsa::launch
