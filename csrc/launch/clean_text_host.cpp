// SPDX-License-Identifier: Apache-2.0
// The source of the kernel of text on a CPU, lane after lane.
#include <exception>

#include "launch/clean_text_params.h"

namespace vsa::launch {

std::string clean_text_emulated(const CleanText& call) {
  CleanTextParams params;
  if (const std::string error = make_params(params, call); !error.empty()) return error;
  try {
    for (int64_t lane = 0; lane < params.row_lanes; ++lane) vsa::CleanText::rows(params, lane);
    for (int tensor = 0; tensor < params.count; ++tensor)
      for (int64_t lane = 0; lane < params.tensors[tensor].lanes; ++lane)
        vsa::CleanText::copy(params, tensor, lane);
  } catch (const std::exception& hazard) {
    return hazard.what();
  }
  return "";
}

}  // namespace vsa::launch
