// SPDX-License-Identifier: Apache-2.0
// Bulk reductions into global memory, matrix products from operands that stay, exponentials.
#pragma once
#include "ceilings_loads.h"

namespace vsa::ceilings {

// ---- fp32 tiles added to global memory ----------------------------------------------------------

struct ReduceParams {
  float* sums;
  int tiles, tile_bytes, count;
  int sharers;  // neighbouring blocks that add to the same tile at about the same time
  uint32_t seed;
  Report report;
};

constexpr int kUnread = 2;  // tiles in shared memory that a reduction may still be reading

__global__ void __launch_bounds__(kWarpThreads)
    reduce(const __grid_constant__ ReduceParams params) {
  extern __shared__ __align__(1024) unsigned char memory[];
  float* tile = reinterpret_cast<float*>(memory);
  const int floats = params.tile_bytes / 4;
  for (int i = threadIdx.x; i < kUnread * floats; i += kWarpThreads) tile[i] = 1;
  fence_async_proxy();
  __syncwarp();
  if (threadIdx.x != 0) return;
  const long long start = clock64();
  for (int n = 0; n < params.count; ++n) {
    const uint32_t to = drawn(params.seed, blockIdx.x / params.sharers, n, params.tiles);
    bulk_reduce_add(params.sums + size_t{to} * floats, tile + n % kUnread * floats,
                    params.tile_bytes);
    bulk_commit();
    bulk_wait_read<kUnread - 1>();
  }
  bulk_wait<0>();
  params.report.clocks[blockIdx.x] = clock64() - start;
}

// ---- matrix products ----------------------------------------------------------------------------

constexpr int kRateWarpgroups = 2;

// m64nNk16: A from shared memory or registers, B with 16 x N in rows of channels (as K) or in rows
// of tokens (as V, which takes the transpose bit).
template <int N, bool RegistersA, bool TransB>
__global__ void __launch_bounds__(kRateWarpgroups* kWarpgroupThreads, 1)
    products(int rounds, Report report) {
  extern __shared__ __align__(1024) unsigned char memory[];
  constexpr int kOperandB = N / 64 * kPanelBytes;
  fill_shared(memory, kRateWarpgroups * kPanelBytes + kOperandB);
  __syncthreads();
  const int own = __shfl_sync(~0u, threadIdx.x, 0) / kWarpgroupThreads;
  const uint32_t a = smem_address(memory) + own * kPanelBytes;
  const uint32_t b = smem_address(memory) + kRateWarpgroups * kPanelBytes;
  Operand<kTileRows> registers;
  fill_operand(registers);
  Fragment<N> d;
  zero(d);
  const long long start = clock64();
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    wgmma_fence();
    VSA_UNROLL
    for (int i = 0; i < 8; ++i) {
      const int k16 = i % 4;
      const uint64_t rows = TransB ? rows_descriptor(b, k16) : channels_descriptor(b, k16);
      if constexpr (RegistersA)
        wgmma<Bf16, TransB>(d, registers, k16, rows, true);
      else
        wgmma<Bf16, false, TransB>(d, channels_descriptor(a, k16), rows, true);
    }
    wgmma_commit();
    wgmma_wait<0>(d);
  }
  const long long clocks = clock64() - start;
  report.sink[blockIdx.x * blockDim.x + threadIdx.x] = total(d);
  if (threadIdx.x == 0) report.clocks[blockIdx.x] = clocks;
}

// ---- exponentials -------------------------------------------------------------------------------

constexpr int kExpThreads = 512;
constexpr int kExpChains = 8;  // independent ones per thread

__global__ void __launch_bounds__(kExpThreads, 1) exponentials(int rounds, Report report) {
  float x[kExpChains];
  VSA_UNROLL
  for (int i = 0; i < kExpChains; ++i) x[i] = 1.0f / (threadIdx.x + i + 1);
  __syncthreads();
  const long long start = clock64();
#pragma unroll 4
  for (int round = 0; round < rounds; ++round) {
    VSA_UNROLL
    for (float& each : x) each = exp2_approx(-each);
  }
  __syncthreads();
  const long long clocks = clock64() - start;
  float sum = 0;
  for (float each : x) sum += each;
  report.sink[blockIdx.x * blockDim.x + threadIdx.x] = sum;
  if (threadIdx.x == 0) report.clocks[blockIdx.x] = clocks;
}

}  // namespace vsa::ceilings
