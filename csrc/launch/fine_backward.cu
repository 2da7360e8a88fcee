// SPDX-License-Identifier: Apache-2.0
// The backward kernels on a GPU: row statistics, then the pass over key tiles, then the one over
// query tiles.
#include "launch/fine_params.h"
#include "launch/sm90_launch.h"

namespace vsa::launch {
namespace {

constexpr int kWarps = 8;

// One block per tile and head; a warp takes every eighth row.
template <class Element, int D>
__global__ void __launch_bounds__(kWarps* kWarpThreads)
    row_stats_kernel(const __grid_constant__ RowStatsParams params) {
  const int lane = threadIdx.x % kWarpThreads;
  for (int row = threadIdx.x / kWarpThreads; row < kTileRows; row += kWarps) {
    write_row_stats<Element, D>(params, blockIdx.z, blockIdx.y, blockIdx.x, row, [=](auto part) {
      float sum = part(lane);
      VSA_UNROLL
      for (int step = kWarpThreads / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
      return sum;
    });
  }
}

}  // namespace

std::string fine_backward(const FineBackward& call, int device, void* opaque_stream) {
  FineBackwardParams params{};
  if (const std::string error = make_params(params, call, encode); !error.empty()) return error;
  const auto stream = static_cast<cudaStream_t>(opaque_stream);
  cudaError_t error = cudaSuccess;
  const bool found = with_config(call, [&](auto element, auto head_dim) {
    using Element = decltype(element);
    using Keys = FineBackwardKeys<FineBackwardKeysConfig<Element, head_dim()>>;
    using Queries = FineBackwardQueries<FineBackwardQueriesConfig<Element, head_dim()>>;
    static_assert(Keys::kConsumers == kKeyTilesPerGroup, "the order of items is made for this");
    const dim3 tiles(params.queries.grid.num_tiles() + params.queries.text_tiles, call.heads,
                     call.batch);
    row_stats_kernel<Element, head_dim()>
        <<<tiles, kWarps * kWarpThreads, 0, stream>>>(row_stats_params(call));
    if ((error = cudaGetLastError()) != cudaSuccess) return;
    error = cudaMemsetAsync(call.tickets, 0, sizeof(int), stream);
    if (error != cudaSuccess) return;
    error = launch_persistent<Keys>(params, params.keys, params.kv_heads, device, stream);
    if (error != cudaSuccess) return;
    error = launch_persistent<Queries>(params, params.queries, params.heads, device, stream);
  });
  return found ? not_launched("a backward kernel", error) : kNoConfig;
}

}  // namespace vsa::launch
