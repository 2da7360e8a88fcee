// SPDX-License-Identifier: Apache-2.0
// Runs a pass of the fine backward on the emulator, on a small problem per schedule seed, and holds
// its gradients against fp64.
//
//   fine_backward NAMESPACE keys|queries|uneven_keys|uneven_queries SEEDS
//                 "seed N: " and the first report within so many seeds, or "nothing"
//
// By turns in one ring and in two. Uneven: some consumers want nearly all of many tiles, others
// few, far apart. The namespaces are vsa, or those of VSA_EACH_BUG: tests/test_backward_bugs.py
// writes them, each with kernels of its own that have a bug.
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
constexpr Grid kFewTiles = make_grid({3, 5, 18}, {3, 5, 4});
// As many as there are bits in a word, of so few tokens that the gradients are soon known.
constexpr Grid kManyTiles = make_grid({1, 2, 63}, {1, 2, 2});
static_assert(kManyTiles.num_tiles() <= kWordBits, "a bitmap row is one word");

// Rings of the same kind with as few stages as they may have.
template <class Rings, int Consumers>
struct Few;
template <template <int, int, int> class TwoRings, int First, int Second, int Any, int Consumers>
struct Few<TwoRings<First, Second, Any>, Consumers> {
  using Rings = TwoRings<3, 4, Consumers>;
};
template <template <int, int> class OneRing, int Stages, int Any, int Consumers>
struct Few<OneRing<Stages, Any>, Consumers> {
  using Rings = OneRing<3, Consumers>;
};

// So few stages that every slot is waited for, in rings like those of another head dim, and an
// item's own tiles where they are not by default: in registers or in shared memory.
template <template <class, int> class Config, int RingsOf, int Steps>
struct TightKeys : Config<Element, D> {
  using Rings =
      typename Few<typename Config<Element, RingsOf>::Rings, Config<Element, D>::kConsumers>::Rings;
  static constexpr int kPlanSteps = Steps;
  static constexpr bool kKeysInRegisters = !Config<Element, D>::kKeysInRegisters;
};
template <template <class, int> class Config, int RingsOf, int Steps>
struct TightQueries : Config<Element, D> {
  using Rings =
      typename Few<typename Config<Element, RingsOf>::Rings, Config<Element, D>::kConsumers>::Rings;
  static constexpr int kPlanSteps = Steps;
  static constexpr bool kQueriesInRegisters = !Config<Element, D>::kQueriesInRegisters;
};
// Steps of a chunk: so few that every item has several, or enough for consumers to stop in windows.
constexpr int kFewSteps = 2, kWindows = 20;

// [tokens, heads, D], with room after it that no one may write.
struct Tensor {
  int tokens, heads;
  std::vector<uint16_t> data;

  Tensor(int tokens, int heads)
      : tokens(tokens), heads(heads), data((tokens * heads + 1) * D, host::kNan16) {}
  launch::TokenView view() const {
    return {data.data(), int64_t{tokens} * heads * D, heads * D, D};
  }
  launch::SequenceView sequence() const { return {view(), {}, {}}; }
  void draw(std::mt19937& rng) {
    std::normal_distribution<float> normal;
    for (int i = 0; i < tokens * heads * D; ++i) data[i] = host::narrow(Element{}, normal(rng));
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

  Sums(int tokens, int heads) : value(tokens * heads * D), size(value.size()) {}
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

// Who wants what: any tile half of the time, or nearly all of them beside few, far apart.
enum class Selection { Random, UnevenQueries, UnevenKeys };

struct Problem {
  const Grid grid;
  const int tokens = grid.num_tokens(), tiles = grid.num_tiles();
  const float scale = 1 / std::sqrt(static_cast<float>(D));
  Tensor q{tokens, kHeads}, k{tokens, kKvHeads}, v{tokens, kKvHeads}, grad_out{tokens, kHeads};
  Tensor grad_q{tokens, kHeads}, grad_k{tokens, kKvHeads}, grad_v{tokens, kKvHeads};
  Sums wanted_q{tokens, kHeads}, wanted_k{tokens, kKvHeads}, wanted_v{tokens, kKvHeads};
  std::vector<uint32_t> selected, transposed;  // [heads, tiles]
  // In one layer both axes give the same order.
  int query_axes[kHeads] = {kAlongT, kAlongW}, key_axes[kKvHeads] = {kAlongT};
  std::vector<int> order;
  int tickets = 0;
  std::vector<RowStats> stats;

  Problem(Selection selection, unsigned seed)
      : grid(selection == Selection::Random ? kFewTiles : kManyTiles),
        selected(kHeads * tiles),
        transposed(kHeads * tiles),
        order(ceil_div(tiles, launch::kKeyTilesPerGroup)),
        stats(kHeads * tiles) {
    std::mt19937 rng(seed);
    for (RowStats& tile : stats) std::fill_n(tile.lse, kTileRows, INFINITY);  // weighs nothing
    for (Tensor* x : {&q, &k, &v, &grad_out}) x->draw(rng);
    if (seed % 3 == 1) lower_scores();
    if (selection == Selection::Random)
      select(seed, rng);
    else
      select_unevenly(selection == Selection::UnevenKeys, rng);
    for (int head = 0; head < kHeads; ++head)
      bitmap::transpose(&selected[head * tiles], tiles, tiles, &transposed[head * tiles]);
    const int groups = static_cast<int>(order.size());
    for (int group = 0; group < groups; ++group)
      order[group] = (group + static_cast<int>(seed)) % groups;
    attend();
  }

  // So far that the weight of a score of 0, that of rows which are no tokens, would be infinite.
  void lower_scores() {
    for (int i = 0; i < tokens * kHeads; ++i) q.data[i * D] = host::narrow(Element{}, 16);
    for (int i = 0; i < tokens * kKvHeads; ++i) k.data[i * D] = host::narrow(Element{}, -80);
  }

  // Nobody selects key tile `none`, every query tile of the first head selects `all`. The last
  // query tiles of the second head may select nothing.
  void select(unsigned seed, std::mt19937& rng) {
    const int none = static_cast<int>(seed + 4) % tiles, all = static_cast<int>(seed) % tiles;
    for (int head = 0; head < kHeads; ++head) {
      const int rows = head > 0 && seed % 3 == 0 ? tiles - 2 : tiles;
      for (int row = 0; row < rows; ++row)
        for (int tile = 0; tile < tiles; ++tile)
          if (tile != none && ((head == 0 && tile == all) || rng() % 2 != 0))
            bitmap::set(&selected[head * tiles + row], tile);
    }
  }

  // The first few rows want nearly all tiles and about every 20th by turns.
  void select_unevenly(bool of_keys, std::mt19937& rng) {
    for (int head = 0; head < kHeads; ++head)
      for (int row = 0; row < 7; ++row)
        for (int tile = 0; tile < tiles; ++tile)
          if (row % 2 == 0 ? rng() % 8 != 0 : rng() % 20 == 0)
            bitmap::set(&selected[head * tiles + (of_keys ? tile : row)], of_keys ? row : tile);
  }

  // The forward pass and the gradients, token by token.
  void attend() {
    const std::vector<double> q = this->q.wide(), k = this->k.wide(), v = this->v.wide(),
                              grad_out = this->grad_out.wide();
    for (int head = 0; head < kHeads; ++head) {
      for (int i = 0; i < tokens; ++i) {
        const int at = (i * kHeads + head) * D;
        std::vector<std::pair<int, double>> weights;  // of the keys that token i attends
        double sum = 0;
        for (int j = 0; j < tokens; ++j) {
          if (!bitmap::test(&selected[head * tiles + grid.tile_of(i)], grid.tile_of(j))) continue;
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
    RowStats& tile = stats[head * tiles + grid.tile_of(token)];
    tile.lse[grid.row_of(token)] = static_cast<float>(lse);
    tile.delta[grid.row_of(token)] = static_cast<float>(delta);
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
    call.grid = call.kv_grid = grid;
    call.batch = 1;
    call.heads = kHeads;
    call.kv_heads = kKvHeads;
    call.head_dim = D;
    call.element = launch::ElementType::Bf16;
    call.scale = scale;
    call.selected = selected.data();
    call.transposed = transposed.data();
    call.query_axes = query_axes;
    call.key_axes = key_axes;
    call.order = order.data();
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
std::string report(Selection selection, unsigned seed, const char* (Problem::*wrong)() const) {
  Problem problem(selection, seed);
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
std::string first_report(Selection selection,
                         unsigned seeds,
                         const char* (Problem::*wrong)() const) {
  for (unsigned seed = 0; seed < seeds; ++seed) {
    const std::string text = report<Kernel<Config>, Kernel<TightConfig>>(selection, seed, wrong);
    if (!text.empty()) return "seed " + std::to_string(seed) + ": " + text;
  }
  return "nothing";
}

#ifndef VSA_EACH_BUG
#define VSA_EACH_BUG(KEYS, QUERIES, UNEVEN_KEYS, UNEVEN_QUERIES) \
  KEYS(vsa) QUERIES(vsa) UNEVEN_KEYS(vsa) UNEVEN_QUERIES(vsa)
#endif

std::string answer(const std::string& space, const std::string& pass, unsigned seeds) {
#define VSA_PASS(name, called, Kernel, selection, wrong, ...) \
  if (space == #name && pass == called)                       \
    return first_report<name::Kernel, __VA_ARGS__>(Selection::selection, seeds, &Problem::wrong);
#define VSA_KEYS(name)                                            \
  VSA_PASS(name, "keys", FineBackwardKeys, Random, wrong_of_keys, \
           name::FineBackwardKeysConfig<Element, D>,              \
           TightKeys<name::FineBackwardKeysConfig, 128, kFewSteps>)
#define VSA_QUERIES(name)                                                  \
  VSA_PASS(name, "queries", FineBackwardQueries, Random, wrong_of_queries, \
           name::FineBackwardQueriesConfig<Element, D>,                    \
           TightQueries<name::FineBackwardQueriesConfig, 128, kFewSteps>)
#define VSA_UNEVEN_KEYS(name)                                                \
  VSA_PASS(name, "uneven_keys", FineBackwardKeys, UnevenKeys, wrong_of_keys, \
           TightKeys<name::FineBackwardKeysConfig, 64, kWindows>,            \
           TightKeys<name::FineBackwardKeysConfig, 128, kWindows>)
#define VSA_UNEVEN_QUERIES(name)                                                         \
  VSA_PASS(name, "uneven_queries", FineBackwardQueries, UnevenQueries, wrong_of_queries, \
           TightQueries<name::FineBackwardQueriesConfig, 64, kWindows>,                  \
           TightQueries<name::FineBackwardQueriesConfig, 128, kWindows>)
  VSA_EACH_BUG(VSA_KEYS, VSA_QUERIES, VSA_UNEVEN_KEYS, VSA_UNEVEN_QUERIES)
  return "?";
}

}  // namespace
}  // namespace vsa::test

int main(int argc, char** argv) {
  std::puts(argc == 4 ? vsa::test::answer(argv[1], argv[2], std::stoul(argv[3])).c_str() : "?");
}
