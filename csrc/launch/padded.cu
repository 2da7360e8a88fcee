// SPDX-License-Identifier: Apache-2.0
// The kernels of padded tiles on a GPU: one warp per row.
#include "launch/cuda_launch.h"
#include "launch/padded_params.h"

namespace vsa::launch {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpThreads;

// Through a shuffle, so that the compiler knows it to be the same for the whole warp.
VSA_DEVICE int own_row() {
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpThreads, 0);
  return static_cast<int>(blockIdx.x) * kWarps + warp;
}

__global__ void __launch_bounds__(kThreads)
    kept_tiles_kernel(const __grid_constant__ KeptTilesParams params) {
  const int row = own_row();
  if (row < params.rows) vsa::KeptTiles::run(params, row);
}

__global__ void __launch_bounds__(kThreads)
    hide_empty_kernel(const __grid_constant__ HideEmptyParams params) {
  const int row = own_row();
  if (row < params.rows) vsa::HideEmpty::run(params, row);
}

unsigned blocks(int rows) { return static_cast<unsigned>((rows + kWarps - 1) / kWarps); }

}  // namespace

std::string keep_tiles(const KeptTiles& call, int device, void* stream) {
  KeptTilesParams params;
  if (const std::string error = make_params(params, call); !error.empty()) return error;
  return launch_on(device, stream, "the kernel of kept tiles", [&](cudaStream_t stream) {
    kept_tiles_kernel<<<blocks(params.rows), kThreads, 0, stream>>>(params);
    return cudaGetLastError();
  });
}

std::string hide_empty(const HideEmpty& call, int device, void* stream) {
  const HideEmptyParams params = params_of(call);
  return launch_on(device, stream, "the kernel of empty tiles", [&](cudaStream_t stream) {
    hide_empty_kernel<<<blocks(params.rows), kThreads, 0, stream>>>(params);
    return cudaGetLastError();
  });
}

}  // namespace vsa::launch
