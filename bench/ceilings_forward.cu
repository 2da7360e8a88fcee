// SPDX-License-Identifier: Apache-2.0
// Loops of a forward's consumers. Each is first run on a few tiles of random numbers, and what it
// leaves is held against double precision.
#include <initializer_list>

#include "ceilings_energy.h"
#include "ceilings_forward_check.h"

namespace vsa::ceilings {

constexpr int kOfEach = 4000;           // tiles of each consumer
constexpr double kSustainedMs = 400.0;  // of calls one after the other, for their energy

// wanted: by which consumers each load is wanted, a bit for each
constexpr Pattern pattern(const char* name, std::initializer_list<uint32_t> wanted) {
  Pattern of{name, 0, 0, {}};
  for (const uint32_t consumers : wanted) {
    for (int w = 0; w < 4; ++w) of.owners[w] |= (consumers >> w & 1) << of.period;
    of.of_each += consumers & 1;
    ++of.period;
  }
  return of;
}

// Loads of a kernel as its lists would have them, where one tile in eight is kept: random lists
// 0.89 loads for each tile of a consumer if there are three, 0.94 or 1 if there are two and 0.81 if
// there are four, correlated ones 0.44, 0.58 and 0.38 (bench/log/wide-products.md).
constexpr Pattern kNoLoads = pattern("none", {15});
constexpr Pattern kThreeRandom =
    pattern("random", {1, 2, 4, 1, 2, 4, 1, 3, 2, 4, 1, 2, 4, 1, 2, 5, 4, 1, 2, 4, 1, 2, 4, 6});
constexpr Pattern kThreeCorrelated =
    pattern("correlated", {7, 3, 7, 5, 1, 7, 6, 7, 3, 2, 7, 5, 7, 6, 4, 7, 3, 7, 5, 6});
constexpr Pattern kTwoRandom = pattern("random", {3, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2});
constexpr Pattern kTwoCorrelated =
    pattern("correlated", {3, 3, 3, 1, 2, 3, 3, 3, 3, 1, 2, 3, 3, 3});
constexpr Pattern kFourRandom = pattern("random", {1, 2, 4, 8, 3, 1, 4,  2, 8, 12, 1, 2, 4,
                                                   8, 5, 2, 1, 8, 4, 10, 1, 2, 4,  8, 6, 9});
constexpr Pattern kFourCorrelated =
    pattern("correlated", {15, 7, 3, 15, 1, 14, 15, 12, 2, 13, 15, 4, 11, 15, 8});

// Of so many consumers.
constexpr Pattern random_loads(int consumers) {
  return consumers == 4 ? kFourRandom : consumers == 3 ? kThreeRandom : kTwoRandom;
}
constexpr Pattern correlated_loads(int consumers) {
  return consumers == 4 ? kFourCorrelated : consumers == 3 ? kThreeCorrelated : kTwoCorrelated;
}

// From a load that a consumer wants to the next one, at most. It holds the values of the former
// until those of the latter are there, so that their stages must differ.
constexpr int farthest(const Pattern& of, int consumers) {
  int most = 0;
  for (int w = 0; w < consumers; ++w)
    for (int n = 0, before = -1; n < 2 * of.period; ++n) {
      if ((of.owners[w] >> n % of.period & 1) == 0) continue;
      if (before >= 0 && n - before > most) most = n - before;
      before = n;
    }
  return most;
}

template <class Loop>
void start(const LoopParams& params, int blocks) {
  loops<Loop><<<blocks, Loop::kThreads, sizeof(typename Loop::Shared)>>>(params);
}

// The largest error of what two blocks leave.
template <class Loop>
double worst_error(LoopParams params) {
  using Shared = typename Loop::Shared;
  constexpr size_t kBlocks = 2, kImage = offsetof(Shared, keys);
  constexpr size_t kNumbers = kBlocks * Loop::kConsumers * Loop::kResults;
  params.steps = 2 * Loop::kValueStages + 1;
  params.images = allocate<unsigned char>(kBlocks * kImage);
  params.results = allocate<float>(kNumbers);
  start<Loop>(params, kBlocks);
  check(cudaDeviceSynchronize(), "a loop");
  const auto images = read_images<Shared>(params.images, kBlocks, kImage);
  std::vector<float> found(kNumbers);
  check(cudaMemcpy(found.data(), params.results, kNumbers * 4, cudaMemcpyDeviceToHost),
        "cudaMemcpy");
  return compare_forward<Loop>(reinterpret_cast<const Shared*>(images.get()), params, kBlocks,
                               found);
}

struct Run {
  const Gpu& gpu;
  const void* tokens;
  int only, next;  // loop to measure, or -1; number of the next one
  bool right;
};

constexpr const char* name_of(Behind order) {
  switch (order) {
    case Behind::Output:
      return "output";
    case Behind::Maximum:
      return "maximum";
    case Behind::Half:
      return "half";
    default:
      return "nothing";
  }
}

template <class Loop>
void measure_loop(Run& run) {
  if (run.next++ != run.only && run.only >= 0) return;
  constexpr int kLayers = 64, D = Loop::D;  // tokens along t
  constexpr int kConsumers = Loop::kConsumers;
  static_assert(farthest(random_loads(kConsumers), kConsumers) < Loop::kValueStages &&
                    farthest(correlated_loads(kConsumers), kConsumers) < Loop::kValueStages,
                "a consumer would wait for values in the stage that it holds");
  const Gpu& gpu = run.gpu;
  allow_shared(loops<Loop>, sizeof(typename Loop::Shared));
  LoopParams params{};
  params.map = map_of_tiles(run.tokens, kLayers);
  params.tiles = kLayers / 4 * kTilesPerLayer;
  params.scale = 0.05f;
  params.report = gpu.report;
  params.pattern = kNoLoads;
  const double worst = worst_error<Loop>(params);
  for (const Pattern& each : {kNoLoads, random_loads(kConsumers), correlated_loads(kConsumers)}) {
    params.pattern = each;
    params.loads = each.name != kNoLoads.name;
    params.steps = kOfEach / Loop::kTiles / each.of_each * each.of_each;
    const double count = 1.0 * params.steps * Loop::kTiles * Loop::kConsumers;  // of an SM
    const double flops = count * gpu.blocks * 4 * D * kTileRows * kTileRows;
    const auto launch = [&](uint32_t seed) {
      params.seed = seed;
      start<Loop>(params, gpu.blocks);
    };
    const Sustained sustained = sustain(kSustainedMs, launch);
    gpu.measure(format("\"probe\": \"loops\", \"d\": %d, \"consumers\": %d, \"tiles\": %d, "
                       "\"behind\": \"%s\", "
                       "\"q\": \"%s\", \"turns\": %d, \"loads\": \"%s\", \"worst\": %.4f, "
                       "\"sustained_ms\": %.4f, \"joules\": %.4f, \"count\": %.0f, \"flops\": %.0f",
                       D, Loop::kConsumers, Loop::kTiles, name_of(Loop::kOrder),
                       Loop::kQueriesInRegisters ? "registers" : "shared",
                       int{Loop::kWhen == Turns::Ordered}, each.name, worst, sustained.ms,
                       sustained.joules, count, flops),
                launch);
  }
  if (worst < kMostError) return;
  std::fprintf(stderr, "a loop at d %d is wrong by %.3f\n", D, worst);
  run.right = false;
}

bool run_loops(const Gpu& gpu, int only) {
  Run run{gpu, random_tokens(32 * kMB), only, 0, true};
  measure_loop<Loop<128, 3, 1, Behind::Output, false>>(run);  // as kernels/fine/forward.h
  measure_loop<Loop<128, 3, 1, Behind::Nothing, false>>(run);
  measure_loop<Loop<128, 2, 1, Behind::Output, true>>(run);
  measure_loop<Loop<128, 2, 2, Behind::Output, false>>(run);
  measure_loop<Loop<128, 2, 2, Behind::Output, true>>(run);
  measure_loop<Loop<128, 2, 2, Behind::Maximum, true>>(run);
  measure_loop<Loop<128, 2, 2, Behind::Maximum, true, Turns::Ordered>>(run);
  measure_loop<Loop<128, 3, 1, Behind::Maximum, false>>(run);
  measure_loop<Loop<128, 2, 2, Behind::Half, true>>(run);
  measure_loop<Loop<128, 2, 2, Behind::Nothing, true>>(run);
  measure_loop<Loop<128, 2, 2, Behind::Output, true, Turns::Ordered>>(run);
  measure_loop<Loop<64, 4, 1, Behind::Output, false>>(run);  // as kernels/fine/forward.h
  measure_loop<Loop<64, 3, 1, Behind::Output, false>>(run);
  measure_loop<Loop<64, 3, 1, Behind::Output, true>>(run);
  measure_loop<Loop<64, 3, 1, Behind::Nothing, true>>(run);
  measure_loop<Loop<64, 3, 2, Behind::Output, false>>(run);
  measure_loop<Loop<64, 3, 2, Behind::Nothing, false>>(run);
  return run.right;
}

}  // namespace vsa::ceilings
