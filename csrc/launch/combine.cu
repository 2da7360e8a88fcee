// SPDX-License-Identifier: Apache-2.0
// combine on a GPU.
#include "kernels/fine/gates.h"
#include "launch/fine_params.h"
#include "launch/tensor_core_launch.h"

namespace vsa::launch {
namespace {

constexpr int kWarps = 8;

// One block per tile and head, the heads of a tile side by side: they share pages of memory. A warp
// takes a few neighbouring rows at a time.
template <class Element, int D>
__global__ void __launch_bounds__(kWarps* kWarpThreads)
    combine_kernel(const __grid_constant__ CombineParams params) {
  const int tile = blockIdx.x / params.heads, head = blockIdx.x % params.heads;
  const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  using Lanes = TokenLanes<D>;
  const TilePlace at = params.queries.place(tile);
  VSA_UNROLL
  for (int i = 0; i < kTileRows; i += kWarps * Lanes::kTokens) {
    const int row = i + warp * Lanes::kTokens + Lanes::token(lane);
    if (params.queries.token(at, row) >= 0)
      combine_row<Element, D>(params, at, blockIdx.y, head, tile, row, Lanes::channel(lane));
  }
}

}  // namespace

std::string combine(const Combine& call, int device, void* stream) {
  const CombineParams params = combine_params(call);
  bool found = true;  // a kernel for this configuration
  const std::string error = launch_on(device, stream, "combine", [&](cudaStream_t stream) {
    found = with_config(call, [&](auto element, auto head_dim) {
      const int tiles = params.queries.grid.num_tiles() + params.queries.text_tiles;
      combine_kernel<decltype(element), head_dim()>
          <<<dim3(tiles * call.heads, call.batch), kWarps * kWarpThreads, 0, stream>>>(params);
    });
    return cudaGetLastError();
  });
  return found ? error : kNoConfig;
}

}  // namespace vsa::launch
