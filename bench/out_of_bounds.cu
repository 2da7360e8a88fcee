// SPDX-License-Identifier: Apache-2.0
// What a TMA load takes whose box lies partly out of bounds: a JSON line per case.
//
//   nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -Icsrc -o out_of_bounds
//        bench/out_of_bounds.cu && ./out_of_bounds [CASE [ROWS]]
//   ncu --launch-skip 1 --launch-count 1 -k regex:load_tiles --metrics
//       lts__t_sectors.min,lts__t_sectors.avg,lts__t_sectors.max,l1tex__m_xbar2l1tex_read_bytes.sum
//       ./out_of_bounds before 16
//
// One thread of each multiprocessor loads tiles of 64 rows by 128 channels, as two boxes of 64
// channels, eight tiles on their way. Of a tile so many rows are in bounds:
//
//   before   the box begins before the tensor and ends with the tile's first rows
//   behind   the box begins with the tile's last rows and ends behind the tensor
//   skewed   the box begins with the tile's first rows and ends behind the tensor, by a map whose
//            rows are counted along two axes (TileSizes of kernels/schedule/sequence.h)
//
// Before anything is timed every number of rows is loaded once by the skewed map, from the first
// tile of the tensor to the last, and held against what is there.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "launch/tensor_core_launch.h"

namespace vsa::launch {
namespace {

constexpr int kTiles = 624, kHeads = 12, kChannels = 128, kStages = 8, kLoads = 2400, kRuns = 5;
enum Case { kBefore, kBehind, kSkewed, kCases };
constexpr const char* kNames[] = {"before", "behind", "skewed"};

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s failed: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

// Of element i of the tensor; never 0.
__host__ __device__ uint16_t number(int64_t i) {
  return static_cast<uint16_t>(static_cast<uint32_t>(i) * 2654435761u >> 16 | 1);
}
__global__ void fill(uint16_t* to, int64_t count) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x)
    to[i] = number(i);
}

VSA_DEVICE BoxCoordinates box_at(int which, int rows, int tile, int head) {
  if (which == kBefore) return {0, rows - kTileRows, 0, tile, head};
  if (which == kBehind) return {0, kTileRows - rows, 0, tile, head};
  return {0, kTileRows - rows, rows - 1, tile, head};
}

struct Stages {
  Tile<kChannels> tiles[kStages];
  Mbarrier full[kStages];
};
constexpr int kStageBytes = sizeof(Stages);

__global__ void load_tiles(const __grid_constant__ TensorMap map, int which, int rows) {
  extern __shared__ __align__(1024) unsigned char memory[];
  Stages& s = *reinterpret_cast<Stages*>(memory);
  if (threadIdx.x == 0)
    for (int i = 0; i < kStages; ++i) s.full[i].init(1, "full", i);
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  __syncthreads();
  if (!elect_lane()) return;
  uint32_t random = blockIdx.x * 7919 + 13;
  for (int n = 0; n < kLoads + kStages; ++n) {
    const int stage = n % kStages;
    if (n >= kStages) s.full[stage].wait(n / kStages - 1);
    if (n >= kLoads) continue;
    random = random * 1664525 + 1013904223;
    s.full[stage].arrive_expect_tx(sizeof(Tile<kChannels>));
    load_tile(s.tiles[stage], map,
              box_at(which, rows, static_cast<int>((random >> 8) % kTiles), n * kHeads / kLoads),
              s.full[stage]);
  }
}

// 64 threads, one for each row.
__global__ void check_skewed(const __grid_constant__ TensorMap map, int* wrong) {
  extern __shared__ __align__(1024) unsigned char memory[];
  Stages& s = *reinterpret_cast<Stages*>(memory);
  if (threadIdx.x == 0) s.full[0].init(1, "full", 0);
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  __syncthreads();
  int use = 0;
  for (int rows = 1; rows <= kTileRows; ++rows)
    for (int tile : {0, 1, kTiles / 2, kTiles - 1})
      for (int head : {0, kHeads - 1}) {
        if (threadIdx.x == 0) {
          s.full[0].arrive_expect_tx(sizeof(Tile<kChannels>));
          load_tile(s.tiles[0], map, box_at(kSkewed, rows, tile, head), s.full[0]);
        }
        s.full[0].wait(use++);
        const int row = static_cast<int>(threadIdx.x);
        const int64_t first = ((int64_t{head} * kTiles + tile) * kTileRows + row) * kChannels;
        for (int channel = 0; channel < kChannels; channel += 2) {
          const uint32_t found = *smem_words(pair_address(s.tiles[0], row, channel));
          const uint32_t there = number(first + channel) | number(first + channel + 1) << 16;
          if (found != (row < rows ? there : 0)) atomicAdd(wrong, 1);
        }
        __syncthreads();
      }
}

TensorMap map_of(uint16_t* data, bool skewed) {
  const TokenView view = {data, int64_t{kHeads} * kTiles * kTileRows * kChannels, kChannels,
                          int64_t{kTiles} * kTileRows * kChannels};
  TensorMap map;
  const std::string error =
      encode(map, map_arguments(view, Folding{0, 1, kHeads}, 1, kHeads, kChannels,
                                {kTiles, 1, kTileRows}, {1, 1, kTileRows}, skewed));
  if (error.empty()) return map;
  std::fprintf(stderr, "%s\n", error.c_str());
  std::exit(1);
}

void measure(const TensorMap& map, int which, int rows, int multiprocessors) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  std::vector<float> times;
  for (int i = 0; i < kRuns; ++i) {
    float ms = 0;
    check(cudaEventRecord(begin), "cudaEventRecord");
    load_tiles<<<multiprocessors, kWarpThreads, kStageBytes>>>(map, which, rows);
    check(cudaGetLastError(), "a launch");
    check(cudaEventRecord(end), "cudaEventRecord");
    check(cudaEventSynchronize(end), "the loads");
    check(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
    times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  std::printf("{\"case\": \"%s\", \"rows in bounds\": %d, \"ns for a tile\": %.1f}\n",
              kNames[which], rows, times[kRuns / 2] * 1e6 / kLoads);
}

}  // namespace
}  // namespace vsa::launch

int main(int count, char** given) {
  using namespace vsa;
  using namespace vsa::launch;
  const int64_t numbers = int64_t{kHeads} * kTiles * kTileRows * kChannels;
  int multiprocessors = 0, wrong = 0;
  uint16_t* data = nullptr;
  int* found = nullptr;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0), "finding SMs");
  check(cudaMalloc(&data, numbers * sizeof(uint16_t)), "cudaMalloc");
  check(cudaMalloc(&found, sizeof(int)), "cudaMalloc");
  check(cudaMemset(found, 0, sizeof(int)), "cudaMemset");
  for (auto kernel :
       {reinterpret_cast<const void*>(load_tiles), reinterpret_cast<const void*>(check_skewed)})
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kStageBytes),
          "cudaFuncSetAttribute");
  fill<<<1024, 256>>>(data, numbers);
  const TensorMap straight = map_of(data, false), skewed = map_of(data, true);
  if (count == 1) {
    check_skewed<<<1, kTileRows, kStageBytes>>>(skewed, found);
    check(cudaMemcpy(&wrong, found, sizeof(int), cudaMemcpyDeviceToHost), "the skewed map");
    if (wrong != 0) {
      std::fprintf(stderr, "the skewed map brings %d wrong pairs of numbers\n", wrong);
      return 1;
    }
  }
  for (int which = kBefore; which < kCases; ++which)
    for (int rows : {64, 32, 16, 8, 1, 0}) {
      // Without a row in bounds the map's first address is read, which is not the tensor's here.
      if (which == kSkewed && rows == 0) continue;
      if (count == 1 || (std::strcmp(given[1], kNames[which]) == 0 &&
                         (count == 2 || std::atoi(given[2]) == rows)))
        measure(which == kSkewed ? skewed : straight, which, rows, multiprocessors);
    }
}
