// SPDX-License-Identifier: Apache-2.0
// tests/cpp/facts.cpp's tile_table as a GPU computes it, from the grid's shape alone.
#include <cuda_runtime.h>

#include "prim/facts.h"

// One block per tile, one thread per row.
__global__ void __launch_bounds__(vsa::kTileRows) write_tile_table(vsa::Axes video,
                                                                   vsa::Axes tile_size,
                                                                   int prefix,
                                                                   int suffix,
                                                                   int32_t* places,
                                                                   uint64_t* masks,
                                                                   int32_t* tokens) {
  const vsa::Grid grid = vsa::make_grid(video, tile_size, prefix, suffix);
  const int tile = static_cast<int>(blockIdx.x), row = static_cast<int>(threadIdx.x);
  const vsa::Place at = grid.place(tile);
  tokens[int64_t{tile} * vsa::kTileRows + row] = grid.token(at, row);
  if (row != 0) return;
  int32_t* out = places + int64_t{tile} * 4;
  out[0] = at.first.t;
  out[1] = at.first.h;
  out[2] = at.first.w;
  out[3] = static_cast<int32_t>(at.clip);
  masks[tile] = grid.row_mask(tile);
}

// Device pointers. Waits for the kernel; returns the runtime's error, 0 for none.
extern "C" int device_tile_table(const int* n,
                                 int tiles,
                                 int32_t* places,
                                 uint64_t* masks,
                                 int32_t* tokens) {
  write_tile_table<<<tiles, vsa::kTileRows>>>({n[0], n[1], n[2]}, {n[3], n[4], n[5]}, n[6], n[7],
                                              places, masks, tokens);
  const cudaError_t error = cudaGetLastError();
  return error != cudaSuccess ? error : cudaDeviceSynchronize();
}
