// SPDX-License-Identifier: Apache-2.0
// The host's part of every measurement: memory, launches with their times, a JSON line for each.
#pragma once
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "ceilings_loads.h"
#include "checked.h"
#include "launch/tensor_core_launch.h"

namespace vsa::ceilings {

constexpr int kLaunches = 7;
constexpr size_t kMB = 1'000'000;

using bench::allocate, bench::check;

struct Gpu {
  int blocks = 0;  // one per multiprocessor
  Report report{};

  Gpu() {
    int major = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "finding a GPU");
    if (major != 9) {
      std::fprintf(stderr, "a GPU of compute capability 9.0 is needed, but it is %d.x\n", major);
      std::exit(1);
    }
    check(cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, 0), "counting SMs");
    report = {allocate<long long>(blocks), allocate<float>(size_t{1024} * blocks)};
  }

  // Runs launch(seed) and prints a line; `fields` are JSON members that describe the case.
  template <class Launch>
  void measure(const std::string& fields, Launch launch) const {
    cudaEvent_t begin, end;
    check(cudaEventCreate(&begin), "cudaEventCreate");
    check(cudaEventCreate(&end), "cudaEventCreate");
    std::vector<float> times;
    for (int i = 0; i <= kLaunches; ++i) {
      float ms = 0;
      check(cudaEventRecord(begin), "cudaEventRecord");
      launch(static_cast<uint32_t>(i) * 7919);
      check(cudaGetLastError(), "a launch");
      check(cudaEventRecord(end), "cudaEventRecord");
      check(cudaEventSynchronize(end), "a kernel");
      check(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
      if (i > 0) times.push_back(ms);  // the first is for warming up
    }
    std::vector<long long> clocks(blocks);
    check(cudaMemcpy(clocks.data(), report.clocks, blocks * sizeof(long long),
                     cudaMemcpyDeviceToHost),
          "cudaMemcpy");
    std::sort(times.begin(), times.end());
    const double spread = (times[kLaunches * 3 / 4] - times[kLaunches / 4]) / 2;
    std::printf("{%s, \"ms\": %.5f, \"spread\": %.4f, \"clocks\": %lld, \"blocks\": %d}\n",
                fields.c_str(), times[kLaunches / 2], spread / times[kLaunches / 2],
                *std::max_element(clocks.begin(), clocks.end()), blocks);
    std::fflush(stdout);
  }
};

template <class... Values>
std::string format(const char* text, Values... values) {
  char line[400];
  std::snprintf(line, sizeof line, text, values...);
  return line;
}

template <class Kernel>
void allow_shared(Kernel* kernel, size_t bytes) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        "asking for shared memory");
}

// Boxes of a tile out of tokens of so many channels, in a grid of so many tokens along h and w.
inline TensorMap map_of_tiles(const void* tokens,
                              int layers,
                              uint64_t channels = kTokenChannels,
                              uint64_t side = kGridSide) {
  const uint64_t depth = static_cast<uint64_t>(layers), token = channels * 2;
  const uint64_t row = token * side, layer = row * side;
  const launch::MapArguments arguments{const_cast<void*>(tokens),
                                       {channels, side, side, depth, 1},
                                       {token, row, layer, layer * depth},
                                       {kPanelChannels, 4, 4, 4, 1}};
  TensorMap map{};
  if (const std::string error = launch::encode(map, arguments); !error.empty()) {
    std::fprintf(stderr, "%s\n", error.c_str());
    std::exit(1);
  }
  return map;
}

constexpr const char* name_of(By how) {
  return how == By::Boxes ? "TMA" : how == By::Rows ? "cp.async" : "TMA, tiles in one piece";
}

// Whole tokens, of which one head of D = 64 is `footprint` bytes.
inline uint32_t* random_tokens(size_t footprint) {
  const size_t words = footprint / 128 * kTokenChannels / 2;
  uint32_t* tokens = allocate<uint32_t>(words);
  fill_random<<<1024, 256>>>(tokens, words);
  check(cudaDeviceSynchronize(), "filling memory");
  return tokens;
}

// ceilings_forward.cu and ceilings_backward.cu; only: one of its loops, or -1 for all. Whether they
// compute what they should
bool run_loops(const Gpu& gpu, int only);
bool run_backward(const Gpu& gpu, int only);

}  // namespace vsa::ceilings
