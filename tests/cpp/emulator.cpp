// SPDX-License-Identifier: Apache-2.0
// Runs the test kernels on the emulator. One command per call, one line of answer:
//
//   numbers                           16-bit conversions that are wrong
//   run bf16|fp16 64|128 SEED         attention: "error E", in units of what rounding allows
//   products bf16|fp16 64|128 SEED    products of a backward pass: results that are wrong
//   mutant NAME SEEDS                    the first report within so many seeds, or "nothing"
//   threads                           "same" if two machines at a time compute as one does
//   speed                             tile steps per second
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "attention.h"
#include "prim/host_block.h"
#include "products.h"

namespace vsa::test {
namespace {

// One head of one video, channels innermost, with room after it that no one may write.
struct Video {
  Grid grid;
  int channels;
  std::vector<uint16_t> data;

  Video(const Grid& grid, int channels)
      : grid(grid), channels(channels), data((grid.num_tokens() + 1) * channels, 0x7fff) {}
  uint16_t& at(int token, int channel) { return data[token * channels + channel]; }
  TensorMap map(uint32_t swizzle = kRowBytes) {
    const auto [t, h, w] = grid.video;
    const auto size = [](int n) { return static_cast<uint64_t>(n); };
    const uint64_t row = size(channels) * 2;
    return {data.data(),
            {size(channels), size(w), size(h), size(t), 1},
            {row, row * size(w), row * size(w * h), row * size(w * h * t)},
            {kPanelChannels, static_cast<uint32_t>(grid.tile.w), static_cast<uint32_t>(grid.tile.h),
             static_cast<uint32_t>(grid.tile.t), 1},
            swizzle};
  }
};

template <class Element>
struct Problem {
  Grid grid;
  int channels;
  Video q, k, v, o;
  float scale;

  Problem(Axes video, Axes tile, int channels, float spread, unsigned seed)
      : grid(make_grid(video, tile)),
        channels(channels),
        q(grid, channels),
        k(grid, channels),
        v(grid, channels),
        o(grid, channels),
        scale(static_cast<float>(M_LOG2E / std::sqrt(channels))) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    for (int token = 0; token < grid.num_tokens(); ++token) {
      for (int c = 0; c < channels; ++c) {
        q.at(token, c) = host::narrow(Element{}, normal(rng) * spread);
        k.at(token, c) = host::narrow(Element{}, normal(rng) * spread);
        v.at(token, c) = host::narrow(Element{}, normal(rng));
      }
    }
  }

  double value(Video& x, int token, int c) { return host::widen(Element{}, x.at(token, c)); }

  // Largest error of o against fp64, in units of what rounding P and O to 16 bits explains.
  double error() {
    const int tokens = grid.num_tokens();
    const double epsilon = std::is_same_v<Element, Bf16> ? 0x1p-8 : 0x1p-11;
    double worst = 0;
    std::vector<double> weights(tokens);
    for (int i = 0; i < tokens; ++i) {
      double peak = -INFINITY, sum = 0;
      for (int j = 0; j < tokens; ++j) {
        weights[j] = 0;
        for (int c = 0; c < channels; ++c) weights[j] += value(q, i, c) * value(k, j, c);
        peak = std::max(peak, weights[j] *= scale);
      }
      for (double& weight : weights) sum += (weight = std::exp2(weight - peak));
      for (int c = 0; c < channels; ++c) {
        double wanted = 0, size = 0;
        for (int j = 0; j < tokens; ++j) {
          wanted += weights[j] / sum * value(v, j, c);
          size += weights[j] / sum * std::abs(value(v, j, c));
        }
        const double error = std::abs(value(o, i, c) - wanted);
        const double allowed = epsilon * (std::abs(wanted) + size) + 1e-6;
        worst = std::isnan(error) ? INFINITY : std::max(worst, error / allowed);
      }
    }
    for (int c = 0; c < channels; ++c)
      if (o.at(tokens, c) != 0x7fff) worst = INFINITY;  // stored past the end
    return worst;
  }
};

template <class Kernel>
void run(Problem<typename Kernel::Element>& problem,
         int blocks,
         unsigned seed,
         bool plain = false) {
  const uint32_t swizzle = plain ? 0 : kRowBytes;
  const typename Kernel::Params params = {problem.q.map(swizzle), problem.k.map(swizzle),
                                          problem.v.map(swizzle), problem.o.map(swizzle),
                                          problem.grid,           problem.scale};
  for (int block = 0; block < blocks; ++block)
    host::run_block<Kernel>(params, block, blocks, seed + block);
}

template <class Element, int D>
std::string run_once(unsigned seed) {
  // Tiles of 60 tokens, clipped along every axis, an odd number of them; large scores now and then.
  Problem<Element> problem({7, 9, 5}, {3, 5, 4}, D, seed % 2 ? 1.f : 3.f, seed);
  run<Attention<Element, D>>(problem, 1 + seed % 2, seed);
  return "error " + std::to_string(problem.error());
}

// P = A B^T * columns, out += P^T B, twice = 2 P B, on one tile; see products.h. The numbers are
// small enough for every sum to be exact, whatever its order: the answer counts wrong results.
template <class Element, int D, class Mutants = NoMutants>
std::string products(unsigned seed) {
  Problem<Element> problem({4, 4, 4}, {4, 4, 4}, D, 1.f, seed);
  Video &a = problem.q, &b = problem.k, &twice = problem.o;
  std::mt19937 rng(seed);
  for (Video* x : {&a, &b})
    for (int i = 0; i < 64 * D; ++i)
      x->data[i] = host::narrow(Element{}, static_cast<float>(rng() % 3) - 1);
  alignas(16) float columns[64];
  for (int c = 0; c < 64; ++c) columns[c] = (c % 2 ? -1.f : 1.f) * static_cast<float>(c % 3) / 2;
  std::vector<float> out(64 * D, 0.5f);
  TensorMap map = a.map();
  if (Mutants::mutant == Mutant::CrookedMap) map.strides[0] += 2;
  host::run_block<Products<Element, D, Mutants>>({map, b.map(), twice.map(), columns, out.data()},
                                                 0, 1, seed);
  std::vector<double> p(64 * 64);
  for (int i = 0; i < 64; ++i)
    for (int j = 0; j < 64; ++j)
      for (int c = 0; c < D; ++c)
        p[i * 64 + j] += problem.value(a, i, c) * problem.value(b, j, c) * columns[j];
  int wrong = 0;
  for (int row = 0; row < 64; ++row) {
    for (int c = 0; c < D; ++c) {
      double down = 0, across = 0;
      for (int k = 0; k < 64; ++k) {
        down += p[k * 64 + row] * problem.value(b, k, c);
        across += 2 * p[row * 64 + k] * problem.value(b, k, c);
      }
      wrong += twice.at(row, c) != host::narrow(Element{}, static_cast<float>(across));
      // The lane and register that hold (row, c % 64).
      const int thread = row / 16 * 32 + row % 8 * 4 + c % 8 / 2;
      const int i = c % 64 / 8 * 4 + row % 16 / 8 * 2 + c % 2;
      wrong += out[c / 64 * 4096 + (i / 4 * 128 + thread) * 4 + i % 4] != 0.5 + down;
    }
  }
  return std::to_string(wrong);
}

// Every 16-bit number survives widening and narrowing; narrowing finds the nearest, ties to even.
std::string numbers() {
  int wrong = 0;
  const auto check = [&](auto element, int special) {
    const auto widen = [&](int bits) { return host::widen(element, static_cast<uint16_t>(bits)); };
    for (int bits = 0; bits < 0x10000; ++bits) {
      const float x = widen(bits);
      const uint16_t back = host::narrow(element, x);
      wrong += std::isnan(x) ? back != host::kNan16 : back != bits;
      if ((bits & 0x7fff) >= special) continue;  // the next one is not finite
      const float next = widen(bits + 1), middle = x + (next - x) / 2;
      wrong += host::narrow(element, middle) != ((bits + 1) & ~1);
      wrong += host::narrow(element, std::nextafter(middle, x)) != bits;
      wrong += host::narrow(element, std::nextafter(middle, next)) != bits + 1;
    }
  };
  check(Bf16{}, 0x7f7f);
  check(Fp16{}, 0x7bff);
  wrong += host::widen(Fp16{}, 0x3c00) != 1 || host::widen(Fp16{}, 0xc500) != -5 ||
           host::widen(Fp16{}, 0x0001) != 0x1p-24f || host::widen(Bf16{}, 0x3f80) != 1;
  wrong += host::narrow(Fp16{}, 65519.f) != 0x7bff || host::narrow(Fp16{}, 65520.f) != 0x7c00;
  return std::to_string(wrong);
}

std::string find_mutant(const std::string& name, unsigned seeds) {
  const auto at = std::find(std::begin(kMutants), std::end(kMutants), name);
  if (at == std::end(kMutants)) return "no such mutant";
  const Mutant mutant = ChosenMutant::mutant = static_cast<Mutant>(at - std::begin(kMutants));
  for (unsigned seed = 0; seed < seeds; ++seed) {
    Problem<Bf16> problem({3, 5, 12}, {3, 5, 4}, 128, 1.f, 7);
    try {
      if (mutant >= Mutant::StagingReused) {
        products<Bf16, 128, ChosenMutant>(seed);
        continue;
      }
      run<Attention<Bf16, 128, ChosenMutant>>(problem, 1, seed, mutant == Mutant::PlainMap);
    } catch (const host::Hazard& hazard) {
      return "seed " + std::to_string(seed) + ": " + hazard.what();
    }
    if (problem.error() > 1) return "seed " + std::to_string(seed) + ": WRONG NUMBERS";
  }
  return "nothing";
}

// Two at a time give the very numbers that one after the other give.
std::string threads() {
  using Kernel = Attention<Bf16, 64>;
  const auto attend = [](unsigned seed) {
    Problem<Bf16> problem({7, 9, 5}, {3, 5, 4}, 64, 1.f, seed);
    run<Kernel>(problem, 2, seed);
    return problem.o.data;
  };
  std::vector<uint16_t> results[2];
  std::thread first([&] { results[0] = attend(1); });
  std::thread second([&] { results[1] = attend(2); });
  first.join();
  second.join();
  return results[0] == attend(1) && results[1] == attend(2) ? "same" : "different";
}

template <class Element, int D>
std::string speed() {
  Problem<Element> problem({4, 4, 4 * 32}, {4, 4, 4}, D, 1.f, 0);
  const auto begin = std::chrono::steady_clock::now();
  run<Attention<Element, D>>(problem, 1, 1);
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
  const int steps = problem.grid.num_tiles() * problem.grid.num_tiles();
  return std::to_string(static_cast<int>(steps / took.count()));
}

std::string answer(const std::vector<std::string>& words) {
  const std::string command = words.empty() ? "" : words[0];
  if ((command == "run" || command == "products") && words.size() == 4) {
    const unsigned seed = std::stoul(words[3]);
    const auto run = [&]<class Element, int D>() {
      return command == "run" ? run_once<Element, D>(seed) : products<Element, D>(seed);
    };
    const bool narrow = words[2] == "64";
    if (words[1] == "bf16")
      return narrow ? run.template operator()<Bf16, 64>() : run.template operator()<Bf16, 128>();
    return narrow ? run.template operator()<Fp16, 64>() : run.template operator()<Fp16, 128>();
  }
  if (command == "numbers") return numbers();
  if (command == "mutant" && words.size() == 3) return find_mutant(words[1], std::stoul(words[2]));
  if (command == "threads") return threads();
  if (command == "speed")
    return "bf16 64: " + speed<Bf16, 64>() + ", bf16 128: " + speed<Bf16, 128>() +
           ", fp16 128: " + speed<Fp16, 128>() + " tile steps per second";
  return "?";
}

}  // namespace
}  // namespace vsa::test

int main(int argc, char** argv) {
  try {
    std::puts(vsa::test::answer(std::vector<std::string>(argv + 1, argv + argc)).c_str());
  } catch (const vsa::host::Hazard& hazard) {
    std::puts(hazard.what());
  }
}
