// SPDX-License-Identifier: Apache-2.0
// The source of the kernels of chunks on a CPU, lane after lane.
#include "launch/chunks_params.h"

namespace vsa::launch {

std::string chunk_means_emulated(const ChunkMeans& call) {
  ChunkMeansParams params;
  if (const std::string error = make_params(params, call); !error.empty()) return error;
  with_chunk_means(call, [&](auto kernel) {
    for (int tensor = 0; tensor < params.count; ++tensor)
      for (int64_t lane = 0; lane < params.tensors[tensor].lanes; ++lane)
        kernel.run(params, tensor, lane);
    for (int tensor = 0; tensor < params.count; ++tensor)
      for (int lane = 0; lane < params.slots[tensor].text_lanes; ++lane)
        kernel.copy_text(params, tensor, lane);
  });
  return "";
}

std::string reorder_bitmap_emulated(const ReorderBitmap& call) {
  ReorderBitmapParams params;
  if (const std::string error = make_params(params, call); !error.empty()) return error;
  for (int64_t lane = 0; lane < params.lanes; ++lane) vsa::ReorderBitmap::run(params, lane);
  return "";
}

}  // namespace vsa::launch
