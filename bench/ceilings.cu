// SPDX-License-Identifier: Apache-2.0
// What one Hopper GPU allows: a JSON line per measurement. ceilings.py compiles and runs this:
//
//   ceilings loads|products|loops [loop]|backward [loop]|reduce|both|wgmma|exp2
//
// Each line has the case, the median and spread of the times of seven launches, the clocks of the
// slowest block of the last one, and how much a launch moves or computes.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "ceilings_both.h"
#include "ceilings_host.h"
#include "ceilings_rates.h"

namespace vsa::ceilings {

constexpr double kLoadedBytes = 8e9, kReducedBytes = 4e9;  // by a launch: about a millisecond

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
  const std::string probe = count >= 2 ? arguments[1] : "";
  if (probe != "loads" && probe != "products" && probe != "loops" && probe != "backward" &&
      probe != "reduce" && probe != "both" && probe != "wgmma" && probe != "exp2") {
    std::fprintf(
        stderr,
        "usage: ceilings loads|products|loops [loop]|backward [loop]|reduce|both|wgmma|exp2\n");
    return 2;
  }
  const Gpu gpu;
  if (probe == "loads" || probe == "products") run_loads(gpu, probe == "products");
  if (probe == "loops" && !run_loops(gpu, count > 2 ? std::atoi(arguments[2]) : -1)) return 1;
  if (probe == "backward" && !run_backward(gpu, count > 2 ? std::atoi(arguments[2]) : -1)) return 1;
  if (probe == "reduce") run_reduce(gpu);
  if (probe == "both") run_both(gpu);
  if (probe == "wgmma") rates<64>(gpu), rates<128>(gpu);
  if (probe == "exp2") run_exp2(gpu);
}
