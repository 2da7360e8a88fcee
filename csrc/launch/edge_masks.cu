// SPDX-License-Identifier: Apache-2.0
// Where every tile lies and which of its rows are tokens, as the device sees it.
#include <cuda_runtime.h>

#include "launch/launch.h"

// Kernels of this project use instructions that only sm_90a has; built for anything else they would
// compile to traps and fail far from the cause.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "vsa's kernels are for sm_90a: build with CMAKE_CUDA_ARCHITECTURES=90a-real"
#endif

namespace vsa::launch {
namespace {

std::string sentence(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return "";
  return std::string(what) + ": " + cudaGetErrorString(error);
}

// One block per tile, one thread per row.
__global__ void __launch_bounds__(kTileRows)
    write_tile_table(Axes video, Axes tile_size, int prefix, int suffix, TileTable table) {
  const Grid grid = make_grid(video, tile_size, prefix, suffix);
  const int tile = blockIdx.x, row = threadIdx.x;
  const Place place = grid.place(tile);
  table.tokens[int64_t{tile} * kTileRows + row] = grid.token(place, row);
  if (row == 0) {
    int32_t* out = table.places + int64_t{tile} * 4;
    out[0] = place.first.t;
    out[1] = place.first.h;
    out[2] = place.first.w;
    out[3] = static_cast<int32_t>(place.clip);
    table.masks[tile] = grid.row_mask(tile);
  }
}

}  // namespace

CudaPart cuda_part() { return {true, CUDART_VERSION, "sm_90a"}; }

std::string device_count(int* count) {
  *count = 0;
  return sentence("no CUDA device can be used", cudaGetDeviceCount(count));
}

std::string device_tile_table(const Grid& grid, const TileTable& table, void* stream) {
  write_tile_table<<<grid.num_tiles(), kTileRows, 0, static_cast<cudaStream_t>(stream)>>>(
      grid.video, grid.tile, grid.prefix, grid.suffix, table);
  return sentence("write_tile_table was not launched", cudaGetLastError());
}

}  // namespace vsa::launch
