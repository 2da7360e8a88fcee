// SPDX-License-Identifier: Apache-2.0
// Runs a pass of the fine backward on the emulator, on a small problem per schedule seed, and holds
// its gradients against fp64.
//
//   fine_backward NAMESPACE keys|queries|tight_keys|tight_queries SEEDS
//                 "seed N: " and the first report within so many seeds, or "nothing"
//
// Tight: with few stages and steps alone, otherwise in turns with as many as on the GPU.
// The namespaces are vsa, or those of VSA_EACH_BUG: tests/test_backward_bugs.py writes them, each
// with kernels of its own that have a bug.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "launch/fine_params.h"
#include "prim/host_block.h"

namespace vsa::test {
namespace {

using Element = Bf16;
constexpr int D = 64, kHeads = 2, kKvHeads = 1;
// Five tiles of 60 tokens, the last one clipped: consumers without a tile in both passes.
constexpr Grid kGrid = make_grid({3, 5, 18}, {3, 5, 4});
constexpr int kTokens = kGrid.num_tokens(), kTiles = kGrid.num_tiles();
constexpr int kGroups = ceil_div(kTiles, launch::kKeyTilesPerGroup);
static_assert(kTiles <= kWordBits, "a bitmap row is one word");

using KeysConfig = FineBackwardKeysConfig<Element, D>;
using QueriesConfig = FineBackwardQueriesConfig<Element, D>;
// So few stages that every slot is waited for, so few steps that an item has several chunks, and an
// item's own tiles where they are not by default: in registers or in shared memory.
struct TightKeysConfig : KeysConfig {
  static constexpr int kStages = 3, kPlanSteps = 2;
  static constexpr bool kKeysInRegisters = !KeysConfig::kKeysInRegisters;
};
struct TightQueriesConfig : QueriesConfig {
  static constexpr int kStages = 3, kPlanSteps = 2;
  static constexpr bool kQueriesInRegisters = !QueriesConfig::kQueriesInRegisters;
};

// [tokens, heads, D], with room after it that no one may write.
struct Tensor {
  int heads;
  std::vector<uint16_t> data;

  explicit Tensor(int heads) : heads(heads), data((kTokens * heads + 1) * D, host::kNan16) {}
  launch::TokenView view() const {
    return {data.data(), int64_t{kTokens} * heads * D, heads * D, D};
  }
  launch::SequenceView sequence() const { return {view(), {}, {}}; }
  void draw(std::mt19937& rng) {
    std::normal_distribution<float> normal;
    for (int i = 0; i < kTokens * heads * D; ++i) data[i] = host::narrow(Element{}, normal(rng));
  }
  std::vector<double> wide() const {
    std::vector<double> values;
    for (const uint16_t bits : data) values.push_back(host::widen(Element{}, bits));
    return values;
  }
};

// Sums in fp64, and those of their terms' sizes: what rounding can be measured by.
struct Sums {
  std::vector<double> value, size;

  explicit Sums(int heads) : value(kTokens * heads * D), size(value.size()) {}
  void add(int at, double factor, const double* x) {
    for (int c = 0; c < D; ++c) {
      value[at + c] += factor * x[c];
      size[at + c] += std::abs(factor * x[c]);
    }
  }
  bool agrees(const Tensor& result) const {
    const std::vector<double> got = result.wide();
    for (size_t i = 0; i < value.size(); ++i)
      if (!(std::abs(got[i] - value[i]) <= 0x1p-8 * (std::abs(value[i]) + size[i]) + 1e-5))
        return false;
    for (size_t i = value.size(); i < got.size(); ++i)
      if (result.data[i] != host::kNan16) return false;  // stored past the end
    return true;
  }
};

double dot(const double* a, const double* b) {
  double sum = 0;
  for (int c = 0; c < D; ++c) sum += a[c] * b[c];
  return sum;
}

struct Problem {
  const float scale = 1 / std::sqrt(static_cast<float>(D));
  Tensor q{kHeads}, k{kKvHeads}, v{kKvHeads}, grad_out{kHeads};
  Tensor grad_q{kHeads}, grad_k{kKvHeads}, grad_v{kKvHeads};
  Sums wanted_q{kHeads}, wanted_k{kKvHeads}, wanted_v{kKvHeads};
  uint32_t selected[kHeads][kTiles] = {}, transposed[kHeads][kTiles] = {};
  // In one layer both axes give the same order.
  int query_axes[kHeads] = {kAlongT, kAlongW}, key_axes[kKvHeads] = {kAlongT};
  int order[kGroups];
  int tickets = 0;
  std::vector<RowStats> stats = std::vector<RowStats>(kHeads * kTiles);

  explicit Problem(unsigned seed) {
    std::mt19937 rng(seed);
    for (RowStats& tile : stats) std::fill_n(tile.lse, kTileRows, INFINITY);  // weighs nothing
    for (Tensor* x : {&q, &k, &v, &grad_out}) x->draw(rng);
    select(seed, rng);
    for (int group = 0; group < kGroups; ++group)
      order[group] = (group + static_cast<int>(seed)) % kGroups;
    attend();
  }

  // Nobody selects key tile `none`, every query tile of the first head selects `all`. The last
  // query tiles of the second head may select nothing.
  void select(unsigned seed, std::mt19937& rng) {
    const int none = static_cast<int>(seed + 4) % kTiles, all = static_cast<int>(seed) % kTiles;
    for (int head = 0; head < kHeads; ++head) {
      const int rows = head > 0 && seed % 3 == 0 ? kTiles - 2 : kTiles;
      for (int row = 0; row < rows; ++row)
        for (int tile = 0; tile < kTiles; ++tile)
          if (tile != none && ((head == 0 && tile == all) || rng() % 2 != 0))
            bitmap::set(&selected[head][row], tile);
      bitmap::transpose(selected[head], kTiles, kTiles, transposed[head]);
    }
  }

  // The forward pass and the gradients, token by token.
  void attend() {
    const std::vector<double> q = this->q.wide(), k = this->k.wide(), v = this->v.wide(),
                              grad_out = this->grad_out.wide();
    for (int head = 0; head < kHeads; ++head) {
      for (int i = 0; i < kTokens; ++i) {
        const int at = (i * kHeads + head) * D;
        std::vector<std::pair<int, double>> weights;  // of the keys that token i attends
        double sum = 0;
        for (int j = 0; j < kTokens; ++j) {
          if (!bitmap::test(&selected[head][kGrid.tile_of(i)], kGrid.tile_of(j))) continue;
          weights.push_back({j * D, std::exp(scale * dot(&q[at], &k[j * D]))});
          sum += weights.back().second;
        }
        std::vector<double> mean(D);
        for (auto& [key, weight] : weights) {
          weight /= sum;
          for (int c = 0; c < D; ++c) mean[c] += weight * v[key + c];
        }
        const double delta = dot(&grad_out[at], mean.data());
        if (sum > 0) note(head, i, std::log2(sum), delta);
        for (const auto& [key, weight] : weights) {
          const double grad = weight * (dot(&grad_out[at], &v[key]) - delta) * scale;
          wanted_q.add(at, grad, &k[key]);
          wanted_k.add(key, grad, &q[at]);
          wanted_v.add(key, weight, &grad_out[at]);
        }
      }
    }
  }

  void note(int head, int token, double lse, double delta) {
    RowStats& tile = stats[head * kTiles + kGrid.tile_of(token)];
    tile.lse[kGrid.row_of(token)] = static_cast<float>(lse);
    tile.delta[kGrid.row_of(token)] = static_cast<float>(delta);
  }

  // The gradient that is wrong, if any, of those that a pass makes.
  const char* wrong_of_keys() const {
    return !wanted_k.agrees(grad_k) ? "dk" : !wanted_v.agrees(grad_v) ? "dv" : nullptr;
  }
  const char* wrong_of_queries() const { return wanted_q.agrees(grad_q) ? nullptr : "dq"; }

  launch::FineBackward call() {
    launch::FineBackward call{};
    call.q = q.sequence();
    call.k = k.sequence();
    call.v = v.sequence();
    call.grad_out = grad_out.sequence();
    call.grad_q = grad_q.sequence();
    call.grad_k = grad_k.sequence();
    call.grad_v = grad_v.sequence();
    call.grid = call.kv_grid = kGrid;
    call.batch = 1;
    call.heads = kHeads;
    call.kv_heads = kKvHeads;
    call.head_dim = D;
    call.element = launch::ElementType::Bf16;
    call.scale = scale;
    call.selected = selected[0];
    call.transposed = transposed[0];
    call.query_axes = query_axes;
    call.key_axes = key_axes;
    call.order = order;
    call.tickets = &tickets;
    call.row_stats = stats.data();
    return call;
  }
};

std::string encode(TensorMap& map, const launch::MapArguments& a) {
  map = {a.base, {}, {}, {}};
  std::copy(std::begin(a.dims), std::end(a.dims), map.dims);
  std::copy(std::begin(a.strides), std::end(a.strides), map.strides);
  std::copy(std::begin(a.box), std::end(a.box), map.box);
  return "";
}

template <class Kernel>
void run(const FineBackwardParams& params, unsigned seed) {
  const int blocks = 1 + static_cast<int>(seed / 2 % 2);
  for (int block = 0; block < blocks; ++block) host::run_block<Kernel>(params, block, blocks, seed);
}

// What is wrong, or nothing.
template <class Kernel, class TightKernel>
std::string report(unsigned seed, const char* (Problem::*wrong)() const) {
  Problem problem(seed);
  const launch::FineBackward call = problem.call();
  FineBackwardParams params;
  if (const std::string error = make_params(params, call, encode); !error.empty()) return error;
  try {
    seed % 2 == 0 ? run<Kernel>(params, seed) : run<TightKernel>(params, seed);
  } catch (const host::Hazard& hazard) {
    return hazard.what();
  }
  const char* gradient = (problem.*wrong)();
  return gradient != nullptr ? std::string("WRONG NUMBERS in ") + gradient : "";
}

template <template <class> class Kernel, class Config, class TightConfig>
std::string first_report(unsigned seeds, const char* (Problem::*wrong)() const) {
  for (unsigned seed = 0; seed < seeds; ++seed) {
    const std::string text = report<Kernel<Config>, Kernel<TightConfig>>(seed, wrong);
    if (!text.empty()) return "seed " + std::to_string(seed) + ": " + text;
  }
  return "nothing";
}

#ifndef VSA_EACH_BUG
#define VSA_EACH_BUG(KEYS, QUERIES, TIGHT_KEYS, TIGHT_QUERIES) KEYS(vsa) QUERIES(vsa)
#endif

std::string answer(const std::string& space, const std::string& pass, unsigned seeds) {
#define VSA_PASS(name, called, Kernel, Config, TightConfig, wrong) \
  if (space == #name && pass == called)                            \
    return first_report<name::Kernel, Config, TightConfig>(seeds, &Problem::wrong);
#define VSA_KEYS(name) \
  VSA_PASS(name, "keys", FineBackwardKeys, KeysConfig, TightKeysConfig, wrong_of_keys)
#define VSA_QUERIES(name)                                                           \
  VSA_PASS(name, "queries", FineBackwardQueries, QueriesConfig, TightQueriesConfig, \
           wrong_of_queries)
#define VSA_TIGHT_KEYS(name) \
  VSA_PASS(name, "tight_keys", FineBackwardKeys, TightKeysConfig, TightKeysConfig, wrong_of_keys)
#define VSA_TIGHT_QUERIES(name)                                                                \
  VSA_PASS(name, "tight_queries", FineBackwardQueries, TightQueriesConfig, TightQueriesConfig, \
           wrong_of_queries)
  VSA_EACH_BUG(VSA_KEYS, VSA_QUERIES, VSA_TIGHT_KEYS, VSA_TIGHT_QUERIES)
  return "?";
}

}  // namespace
}  // namespace vsa::test

int main(int argc, char** argv) {
  std::puts(argc == 4 ? vsa::test::answer(argv[1], argv[2], std::stoul(argv[3])).c_str() : "?");
}
