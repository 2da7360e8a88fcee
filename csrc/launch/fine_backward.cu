// SPDX-License-Identifier: Apache-2.0
// The backward kernels on a GPU: the pass over tokens, and after it the one over key tiles and the
// one over query tiles, or one pass that adds up dQ, and one that rounds it.
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
  Rows::clear_sums(params, of, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
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

// One block per tile and head, the heads of a tile side by side, as in the pass over tokens.
template <class Element>
__global__ void __launch_bounds__(RoundSums<Element>::kThreads)
    round_sums_kernel(const __grid_constant__ RoundSumsParams params) {
  const int tile = blockIdx.x / params.heads, head = blockIdx.x % params.heads;
  RoundSums<Element>::rows(params, blockIdx.y, head, tile, static_cast<int>(threadIdx.x));
}

template <class Element>
cudaError_t launch_one_pass(const FineBackward& call,
                            const FineBackwardParams& params,
                            int device,
                            cudaStream_t stream) {
  using Pass = FineBackwardKeys<FineBackwardOnePassConfig<Element, 64>>;
  static_assert(Pass::kConsumers == kKeyTilesPerGroup, "the order of items is made for this");
  const cudaError_t error =
      launch_persistent<Pass>(params, params.keys, params.kv_heads, device, stream);
  if (error != cudaSuccess) return error;
  const dim3 blocks(params.queries.grid.num_tiles() * call.heads, call.batch);
  round_sums_kernel<Element>
      <<<blocks, RoundSums<Element>::kThreads, 0, stream>>>(round_sums_params(call, params));
  return cudaGetLastError();
}

template <class Element, int D>
cudaError_t launch_two_passes(const FineBackwardParams& params, int device, cudaStream_t stream) {
  using Keys = FineBackwardKeys<FineBackwardKeysConfig<Element, D>>;
  using Queries = FineBackwardQueries<FineBackwardQueriesConfig<Element, D>>;
  static_assert(Keys::kConsumers == kKeyTilesPerGroup, "the order of items is made for this");
  const cudaError_t error =
      launch_persistent<Keys>(params, params.keys, params.kv_heads, device, stream);
  if (error != cudaSuccess) return error;
  return launch_persistent<Queries>(params, params.queries, params.heads, device, stream);
}

}  // namespace

std::string backward_rows(const FineBackward& call, int device, void* stream) {
  if (std::string refused = refused_one_pass(call); !refused.empty()) return refused;
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
      if constexpr (head_dim() == 64)
        if (call.grad_q_sums != nullptr) {
          error = launch_one_pass<Element>(call, params, device, stream);
          return;
        }
      error = launch_two_passes<Element, head_dim()>(params, device, stream);
    });
    return error;
  };
  const std::string error = launch_on(device, stream, "a backward kernel", launch);
  return found ? error : kNoConfig;
}

}  // namespace vsa::launch
