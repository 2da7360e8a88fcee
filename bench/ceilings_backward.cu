// SPDX-License-Identifier: Apache-2.0
// Loops of a backward: of its two passes, and of one pass that adds dQ up on chip. Each is first
// run on a few tiles of random numbers, and what it leaves is held against double precision.
#include "ceilings_backward_check.h"
#include "ceilings_host.h"
#include "ceilings_one_pass.h"
#include "ceilings_two_passes.h"

namespace vsa::ceilings {

constexpr int kSteps = 3001;      // odd, as a loop of two steps after three wants it
constexpr int kQueryTiles = 512;  // of a grid of 32x32x32: how many tiles dQ has
constexpr int kSlots = 4;         // places for each, where sums of bf16 are to be over few

template <class Loop>
void start(const BackwardParams& params, int blocks) {
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = Loop::kThreads;
  config.dynamicSmemBytes = sizeof(typename Loop::Shared);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {Loop::kCluster, 1, 1};
  config.attrs = &cluster;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, backward_loop<Loop>, params), "a launch");
}

// How many blocks run at the same time, in whole clusters.
template <class Loop>
int blocks_at_once(const Gpu& gpu) {
  static_assert(sizeof(typename Loop::Shared) <= kSharedBytes);
  allow_shared(backward_loop<Loop>, sizeof(typename Loop::Shared));
  return gpu.blocks / Loop::kCluster * Loop::kCluster;
}

// The largest error of what two blocks leave, as a multiple of the numbers' root mean square.
template <class Loop>
double worst_error(BackwardParams params, Sum to) {
  using Shared = typename Loop::Shared;
  constexpr size_t kBlocks = 2, kImage = offsetof(Shared, barriers);
  params.steps = 2 * Loop::kStages + 1;
  params.loads = 0;
  params.sum_tiles = 0;
  const size_t results = kBlocks * Loop::kResults * kTileRows * Loop::D;
  const size_t sums = kBlocks * params.steps * kTileRows * Loop::D;
  params.images = allocate<unsigned char>(kBlocks * kImage);
  params.results = allocate<float>(results);
  params.sums = allocate<float>(sums);
  start<Loop>(params, kBlocks);
  check(cudaDeviceSynchronize(), "a loop");
  const auto images = read_images<Shared>(params.images, kBlocks, kImage);
  std::vector<float> found(results), added(sums);
  check(cudaMemcpy(found.data(), params.results, results * 4, cudaMemcpyDeviceToHost),
        "cudaMemcpy");
  check(cudaMemcpy(added.data(), params.sums, sums * 4, cudaMemcpyDeviceToHost), "cudaMemcpy");
  const auto* shared = reinterpret_cast<const Shared*>(images.get());
  if constexpr (Loop::kProducts == 3)
    return compare_queries<Loop>(shared, params, found);
  else
    return compare_keys<Loop>(shared, params, found, added, to);
}

struct Run {
  const Gpu& gpu;
  const void* tokens;
  void* sums;
  int only, next;  // loop to measure, or -1; number of the next one
  bool right;
};

template <class Loop>
void measure_loop(Run& run, const char* name, Sum to) {
  if (run.next++ != run.only && run.only >= 0) return;
  constexpr int kLayers = 64, D = Loop::D;
  Gpu with = run.gpu;
  with.blocks = blocks_at_once<Loop>(run.gpu);
  BackwardParams params{};
  params.map = map_of_tiles(run.tokens, kLayers);
  params.tiles = kLayers / 4 * kTilesPerLayer;
  params.scale = 0.05f;
  params.report = with.report;
  const double worst = worst_error<Loop>(params, to);
  params.steps = kSteps;
  params.sums = run.sums;
  params.sum_tiles = kQueryTiles * (to == Sum::Pairs ? kSlots : 1);
  const double count = 1.0 * kSteps * Loop::kConsumers;  // pairs of tiles, of an SM
  for (int loads = 0; loads <= (Loop::kCluster == 1); ++loads) {
    params.loads = loads;
    const std::string fields = format(
        "\"probe\": \"backward\", \"d\": %d, \"loop\": \"%s\", \"loads\": %d, \"worst\": %.4f, "
        "\"count\": %.0f, \"flops\": %.0f",
        D, name, loads, worst, count,
        count * with.blocks * 2 * Loop::kProducts * D * kTileRows * kTileRows);
    with.measure(fields, [&](uint32_t seed) {
      params.seed = seed;
      start<Loop>(params, with.blocks);
    });
  }
  if (worst < kMostError) return;
  std::fprintf(stderr, "%s at d %d is wrong by %.3f of its numbers\n", name, D, worst);
  run.right = false;
}

template <int D, Maker By, Sum To, int Cluster, int Lag = 0>
void one_pass(Run& run) {
  constexpr const char* kWho = By == Maker::Consumers ? "consumers" : "a third warpgroup";
  constexpr const char* kHow = To == Sum::Nothing  ? "dQ stays"
                               : To == Sum::Floats ? "bulk fp32"
                               : To == Sum::Pairs  ? "bulk bf16"
                                                   : "red.v4";
  const std::string name = format("%s tiles, dQ by %s%s, %s", Cluster == 1 ? "2" : "4", kWho,
                                  Lag > 0 ? " a step later" : "", kHow);
  measure_loop<OnePass<D, By, To, Cluster, Lag>>(run, name.c_str(), To);
}

template <int D>
void backward(Run& run) {
  measure_loop<KeyLoop<D>>(run, "pass over keys", Sum::Nothing);
  measure_loop<QueryLoop<D>>(run, "pass over queries", Sum::Nothing);
  one_pass<D, Maker::Consumers, Sum::Nothing, 1>(run);
  one_pass<D, Maker::Consumers, Sum::Floats, 1>(run);
  one_pass<D, Maker::Consumers, Sum::Pairs, 1>(run);
  one_pass<D, Maker::Consumers, Sum::Registers, 1>(run);
  if constexpr (D == 128) one_pass<D, Maker::Consumers, Sum::Floats, 1, 1>(run);
  if constexpr (D == 64) {
    one_pass<D, Maker::Another, Sum::Nothing, 1>(run);
    one_pass<D, Maker::Another, Sum::Floats, 1>(run);
    one_pass<D, Maker::Another, Sum::Pairs, 1>(run);
    one_pass<D, Maker::Another, Sum::Registers, 1>(run);
  }
  one_pass<D, D == 128 ? Maker::Consumers : Maker::Another, Sum::Floats, 2>(run);
}

bool run_backward(const Gpu& gpu, int only) {
  void* sums = allocate<float>(size_t{kQueryTiles} * kSlots * kTileRows * 128);
  Run run{gpu, random_tokens(32 * kMB), sums, only, 0, true};
  backward<128>(run);
  backward<64>(run);
  return run.right;
}

}  // namespace vsa::ceilings
