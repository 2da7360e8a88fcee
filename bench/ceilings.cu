// SPDX-License-Identifier: Apache-2.0
// What one Hopper GPU allows: a JSON line per measurement. ceilings.py compiles and runs this:
//
//   ceilings loads|products|loops|reduce|both|wgmma|exp2
//
// Each line has the case, the median and spread of the times of seven launches, the clocks of the
// slowest block of the last one, and how much a launch moves or computes.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "ceilings_both.h"
#include "ceilings_loops.h"
#include "ceilings_rates.h"
#include "launch/tensor_core_launch.h"

namespace vsa::ceilings {

constexpr int kLaunches = 7;
constexpr double kLoadedBytes = 8e9, kReducedBytes = 4e9;  // by a launch: about a millisecond
constexpr size_t kMB = 1'000'000;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s failed: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

// Device memory that the process keeps until its end.
template <class T>
T* allocate(size_t count) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, count * sizeof(T)), "cudaMalloc");
  check(cudaMemset(memory, 0, count * sizeof(T)), "cudaMemset");
  return static_cast<T*>(memory);
}

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
TensorMap map_of_tiles(const void* tokens,
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

// One head of 1536 / D, whose channels lie inside the token as in a model; or that head's tiles one
// after the other.
template <int D, By How, int Users>
void load_tiles(const Gpu& gpu, const void* tokens, size_t footprint) {
  using Kernel = Loads<D, How, Users>;
  const int layers = static_cast<int>(footprint / (2 * D) / (kGridSide * kGridSide)) / 4 * 4;
  LoadParams params{};
  params.tiles = layers / 4 * kTilesPerLayer;
  params.map = How == By::Pieces ? map_of_tiles(tokens, params.tiles * 4, D, 4)
                                 : map_of_tiles(tokens, layers);
  params.tokens = static_cast<const unsigned char*>(tokens);
  params.slots = static_cast<int>(kLoadedBytes / gpu.blocks / Kernel::kTileBytes) / 4 * 4;
  params.report = gpu.report;
  const auto kernel = loads<D, How, Users>;
  allow_shared(kernel, sizeof(typename Kernel::Shared));
  const double bytes = double{Kernel::kTileBytes} * params.slots * gpu.blocks;
  const std::string fields = format(
      "\"probe\": \"loads\", \"d\": %d, \"by\": \"%s\", \"users\": %d, \"footprint\": %.1f, "
      "\"bytes\": %.0f, \"flops\": %.0f",
      D, name_of(How), Users, 2e-6 * params.tiles * kTileRows * D, bytes,
      bytes * kTileRows * Users);
  gpu.measure(fields, [&](uint32_t seed) {
    params.seed = seed;
    kernel<<<gpu.blocks, Kernel::kThreads, sizeof(typename Kernel::Shared)>>>(params);
  });
}

template <int Users>
void load_all(const Gpu& gpu, const void* tokens, size_t footprint) {
  load_tiles<128, By::Boxes, Users>(gpu, tokens, footprint);
  load_tiles<128, By::Rows, Users>(gpu, tokens, footprint);
  load_tiles<128, By::Pieces, Users>(gpu, tokens, footprint);
  load_tiles<64, By::Boxes, Users>(gpu, tokens, footprint);
  load_tiles<64, By::Rows, Users>(gpu, tokens, footprint);
  load_tiles<64, By::Pieces, Users>(gpu, tokens, footprint);
}

// Whole tokens, of which one head of D = 64 is `footprint` bytes.
uint32_t* random_tokens(size_t footprint) {
  const size_t words = footprint / 128 * kTokenChannels / 2;
  uint32_t* tokens = allocate<uint32_t>(words);
  fill_random<<<1024, 256>>>(tokens, words);
  check(cudaDeviceSynchronize(), "filling memory");
  return tokens;
}

void run_loads(const Gpu& gpu, bool with_products) {
  constexpr size_t kLargest = 96 * kMB;
  uint32_t* tokens = random_tokens(kLargest);
  for (size_t footprint : {16 * kMB, 32 * kMB, 48 * kMB, 64 * kMB, kLargest}) {
    if (!with_products) {
      load_all<0>(gpu, tokens, footprint);
      continue;
    }
    load_all<1>(gpu, tokens, footprint);
    load_all<2>(gpu, tokens, footprint);
  }
}

template <int D, int Consumers, int Tiles, Behind Order, bool QueriesInRegisters>
void loop(const Gpu& gpu, const void* tokens) {
  using Kernel = Loop<D, Consumers, Tiles, Order, QueriesInRegisters>;
  constexpr int kLayers = 64, kOfEach = 4000;  // tokens along t; tiles of each consumer
  constexpr int kLoadRates[] = {0, 33};        // bytes per clock that are asked for, about L2's
  const auto kernel = loops<Kernel>;
  allow_shared(kernel, sizeof(typename Kernel::Shared));
  for (const int rate : kLoadRates) {
    LoopParams params{};
    params.map = map_of_tiles(tokens, kLayers);
    params.tiles = kLayers / 4 * kTilesPerLayer;
    params.steps = kOfEach / Tiles;
    params.clocks = rate == 0 ? 0 : Kernel::kTileBytes / rate;
    params.scale = 0.05f;
    params.report = gpu.report;
    const double count = 1.0 * kOfEach * Consumers;  // of an SM
    const std::string fields = format(
        "\"probe\": \"loops\", \"d\": %d, \"consumers\": %d, \"tiles\": %d, \"behind\": \"%s\", "
        "\"q\": \"%s\", \"load_rate\": %d, \"count\": %.0f, \"flops\": %.0f",
        D, Consumers, Tiles, Order == Behind::Output ? "output" : "nothing",
        QueriesInRegisters ? "registers" : "shared", rate, count,
        count * gpu.blocks * 4 * D * kTileRows * kTileRows);
    gpu.measure(fields, [&](uint32_t seed) {
      params.seed = seed;
      kernel<<<gpu.blocks, Kernel::kThreads, sizeof(typename Kernel::Shared)>>>(params);
    });
  }
}

void run_loops(const Gpu& gpu) {
  const uint32_t* tokens = random_tokens(32 * kMB);
  loop<128, 3, 1, Behind::Output, false>(gpu, tokens);
  loop<128, 3, 1, Behind::Nothing, false>(gpu, tokens);
  loop<128, 2, 1, Behind::Output, true>(gpu, tokens);
  loop<128, 2, 2, Behind::Output, false>(gpu, tokens);
  loop<64, 3, 1, Behind::Output, false>(gpu, tokens);
  loop<64, 3, 1, Behind::Output, true>(gpu, tokens);
  loop<64, 3, 1, Behind::Nothing, true>(gpu, tokens);
  loop<64, 3, 2, Behind::Output, false>(gpu, tokens);
  loop<64, 3, 2, Behind::Nothing, false>(gpu, tokens);
}

void run_reduce(const Gpu& gpu) {
  float* sums = allocate<float>(96 * kMB / 4);
  allow_shared(reduce, size_t{kUnread} << 15);
  for (size_t footprint : {12 * kMB, 24 * kMB, 48 * kMB, 96 * kMB})
    for (int tile_bytes : {1 << 14, 1 << 15})
      for (int sharers : {1, 2, 8}) {
        const int tiles = static_cast<int>(footprint / tile_bytes);
        const int count = static_cast<int>(kReducedBytes / gpu.blocks / tile_bytes);
        const std::string fields = format(
            "\"probe\": \"reduce\", \"tile_bytes\": %d, \"sharers\": %d, \"footprint\": %.1f, "
            "\"bytes\": %.0f",
            tile_bytes, sharers, 1e-6 * tiles * tile_bytes, 1.0 * tile_bytes * count * gpu.blocks);
        gpu.measure(fields, [&](uint32_t seed) {
          reduce<<<gpu.blocks, kWarpThreads, kUnread * tile_bytes>>>(
              {sums, tiles, tile_bytes, count, sharers, seed, gpu.report});
        });
      }
}

// Q and dO out of so many bytes, dQ into twice as many.
template <int D>
void load_and_add(const Gpu& gpu, const void* tokens, float* sums, size_t footprint) {
  using Kernel = Both<D>;
  const int layers = static_cast<int>(footprint / (2 * D) / (kGridSide * kGridSide)) / 4 * 4;
  BothParams params{};
  params.map = map_of_tiles(tokens, layers);
  params.sums = sums;
  params.tiles = params.sum_tiles = layers / 4 * kTilesPerLayer;
  params.pairs = static_cast<int>(kReducedBytes / gpu.blocks / Kernel::kSumBytes);
  params.report = gpu.report;
  allow_shared(both<D>, sizeof(typename Kernel::Shared));
  const double pairs = 1.0 * params.pairs;  // of an SM
  const std::string fields = format(
      "\"probe\": \"both\", \"d\": %d, \"footprint\": %.1f, \"count\": %.0f, \"bytes\": %.0f", D,
      2e-6 * params.tiles * kTileRows * D, pairs, 2 * pairs * Kernel::kSumBytes * gpu.blocks);
  gpu.measure(fields, [&](uint32_t seed) {
    params.seed = seed;
    both<D><<<gpu.blocks, Kernel::kThreads, sizeof(typename Kernel::Shared)>>>(params);
  });
}

void run_both(const Gpu& gpu) {
  constexpr size_t kLargest = 24 * kMB;
  const uint32_t* tokens = random_tokens(kLargest);
  float* sums = allocate<float>(2 * kLargest / 4);
  for (size_t footprint : {4 * kMB, 8 * kMB, 12 * kMB, kLargest}) {
    load_and_add<128>(gpu, tokens, sums, footprint);
    load_and_add<64>(gpu, tokens, sums, footprint);
  }
}

template <int N, bool RegistersA, bool TransB>
void rate(const Gpu& gpu) {
  constexpr int kRounds = 4000, kBytes = (kRateWarpgroups + N / 64) * kPanelBytes;
  const auto kernel = products<N, RegistersA, TransB>;
  allow_shared(kernel, kBytes);
  const double count = 8.0 * kRounds * kRateWarpgroups;  // of an SM
  const std::string fields = format(
      "\"probe\": \"wgmma\", \"n\": %d, \"a\": \"%s\", \"b\": \"%s\", \"count\": %.0f, "
      "\"flops\": %.0f",
      N, RegistersA ? "registers" : "shared", TransB ? "rows (V)" : "channels (K)", count,
      count * gpu.blocks * 2 * 64 * N * 16);
  gpu.measure(fields, [&](uint32_t) {
    kernel<<<gpu.blocks, kRateWarpgroups * kWarpgroupThreads, kBytes>>>(kRounds, gpu.report);
  });
}

template <int N>
void rates(const Gpu& gpu) {
  rate<N, false, false>(gpu);
  rate<N, false, true>(gpu);
  rate<N, true, false>(gpu);
  rate<N, true, true>(gpu);
}

void run_exp2(const Gpu& gpu) {
  constexpr int kRounds = 4000;
  const double count = 1.0 * kRounds * kExpChains * kExpThreads;
  gpu.measure(format("\"probe\": \"exp2\", \"count\": %.0f", count),
              [&](uint32_t) { exponentials<<<gpu.blocks, kExpThreads>>>(kRounds, gpu.report); });
}

}  // namespace vsa::ceilings

int main(int count, char** arguments) {
  using namespace vsa::ceilings;
  const std::string probe = count == 2 ? arguments[1] : "";
  if (probe != "loads" && probe != "products" && probe != "loops" && probe != "reduce" &&
      probe != "both" && probe != "wgmma" && probe != "exp2") {
    std::fprintf(stderr, "usage: ceilings loads|products|loops|reduce|both|wgmma|exp2\n");
    return 2;
  }
  const Gpu gpu;
  if (probe == "loads" || probe == "products") run_loads(gpu, probe == "products");
  if (probe == "loops") run_loops(gpu);
  if (probe == "reduce") run_reduce(gpu);
  if (probe == "both") run_both(gpu);
  if (probe == "wgmma") rates<64>(gpu), rates<128>(gpu);
  if (probe == "exp2") run_exp2(gpu);
}
