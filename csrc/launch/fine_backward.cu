// SPDX-License-Identifier: Apache-2.0
// The backward kernels on a GPU: the pass over tokens, and after it the one over key tiles and the
// one over query tiles.
#include "launch/fine_params.h"
#include "launch/tensor_core_launch.h"

namespace vsa::launch {
namespace {

constexpr int kWarps = 8;

// One block per tile and head, the heads of a tile side by side: they share pages of memory. A warp
// takes a few neighbouring rows at a time.
template <class Element, int D, bool Gated>
__global__ void __launch_bounds__(kWarps* kWarpThreads)
    backward_rows_kernel(const __grid_constant__ BackwardRowsParams params) {
  using Rows = BackwardRows<Element, D, Gated>;
  using Lanes = TokenLanes<D>;
  __shared__ Channels shared[kWarps][kWarpThreads];
  const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  const int tile = blockIdx.x / params.heads, head = blockIdx.x % params.heads;
  const typename Rows::HeadTile of(params, blockIdx.y, head, tile);
  Channels sums = {};
  VSA_UNROLL
  for (int i = 0; i < kTileRows; i += kWarps * Lanes::kTokens) {
    const int row = i + warp * Lanes::kTokens + Lanes::token(lane);
    Rows::row(params, of, row, Lanes::channel(lane), sums, [](float x) {
      VSA_UNROLL
      for (int step = Lanes::kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
      return x;
    });
  }
  if (!Gated || params.gate_coarse.data == nullptr || of.at.region != Region::Video) return;
  shared[warp][lane] = sums;
  __syncthreads();
  const int64_t of_head = int64_t{of.batch} * params.heads + head;
  float* to = params.grad_coarse + (of_head * params.queries.grid.num_tiles() + tile) * D;
  if (threadIdx.x < D) {
    const int of_token = threadIdx.x / kChunkElements, channel = threadIdx.x % kChunkElements;
    float sum = 0;
    for (const auto& of_warp : shared)
      for (int token = 0; token < Lanes::kTokens; ++token)
        sum += of_warp[token * Lanes::kLanes + of_token].x[channel];
    to[threadIdx.x] = sum;
  }
}

}  // namespace

std::string backward_rows(const FineBackward& call, int device, void* stream) {
  const BackwardRowsParams params = backward_rows_params(call);
  bool found = true;  // a kernel for this configuration
  const auto launch = [&](cudaStream_t stream) {
    found = with_config(call, [&](auto element, auto head_dim) {
      using Element = decltype(element);
      const auto kernel = any(call.gates) ? backward_rows_kernel<Element, head_dim(), true>
                                          : backward_rows_kernel<Element, head_dim(), false>;
      const int tiles = params.queries.grid.num_tiles() + params.queries.text_tiles;
      kernel<<<dim3(tiles * call.heads, call.batch), kWarps * kWarpThreads, 0, stream>>>(params);
    });
    return cudaGetLastError();
  };
  const std::string error = launch_on(device, stream, "the backward's pass over tokens", launch);
  return found ? error : kNoConfig;
}

std::string fine_backward(const FineBackward& call, int device, void* stream) {
  FineBackwardParams params{};
  if (const std::string error = make_params(params, call, encode); !error.empty()) return error;
  bool found = true;  // a kernel for this configuration
  const auto launch = [&](cudaStream_t stream) {
    cudaError_t error = cudaSuccess;
    found = with_config(call, [&](auto element, auto head_dim) {
      using Element = decltype(element);
      using Keys = FineBackwardKeys<FineBackwardKeysConfig<Element, head_dim()>>;
      using Queries = FineBackwardQueries<FineBackwardQueriesConfig<Element, head_dim()>>;
      error = launch_persistent<Keys>(params, params.keys, params.kv_heads, device, stream);
      if (error != cudaSuccess) return;
      error = launch_persistent<Queries>(params, params.queries, params.heads, device, stream);
    });
    return error;
  };
  const std::string error = launch_on(device, stream, "a backward kernel", launch);
  return found ? error : kNoConfig;
}

}  // namespace vsa::launch
