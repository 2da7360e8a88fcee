// SPDX-License-Identifier: Apache-2.0
// What small problems for the kernels of the fine stage share: tensors, selections, sums in fp64,
// calls, and rings of as few stages as they may have.
#pragma once
#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "launch/emulated_map.h"
#include "launch/fine_params.h"
#include "prim/host_block.h"
#include "reports.h"

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

// So few stages that every load is waited for, in rings of the kind that another head_dim has.
template <template <class, int> class Config, int RingsOf, int Loads>
struct Tight : Config<Element, D> {
  using Rings =
      typename Few<typename Config<Element, RingsOf>::Rings, Config<Element, D>::kConsumers>::Rings;
  static constexpr int kChunkLoads = Loads;
};
// Loads of a chunk: so few that every work tile has several chunks, or enough for skips by window.
constexpr int kFewLoads = 2, kWindows = 20;

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
  void add(int at, double factor, const double* x) { add_to(&value[at], &size[at], factor, x); }
  VSA_FAST static void add_to(double* value, double* size, double factor, const double* x) {
    for (int c = 0; c < D; ++c) {
      const double term = factor * x[c];
      value[c] += term;
      size[c] += term < 0 ? -term : term;  // std::abs would be a call
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

VSA_FAST double dot(const double* a, const double* b) {
  double sums[8] = {}, sum = 0;
  for (int c = 0; c < D; c += 8)
    for (int i = 0; i < 8; ++i) sums[i] += a[c + i] * b[c + i];
  for (const double part : sums) sum += part;
  return sum;
}

// sums += factor * x
[[maybe_unused]] VSA_FAST void add_product(double* sums, double factor, const double* x) {
  for (int c = 0; c < D; ++c) sums[c] += factor * x[c];
}

// Who wants what: any tile half of the time, or nearly all of them beside few, far apart.
enum class Selection { Random, UnevenQueries, UnevenKeys };

// Nobody selects key tile `none`, every query tile of the first head selects `all`. The last query
// tiles of the second head may select nothing. selected: [heads, tiles], a word each
inline void select(std::vector<uint32_t>& selected, int tiles, unsigned seed, std::mt19937& rng) {
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
inline void select_unevenly(std::vector<uint32_t>& selected,
                            int tiles,
                            bool of_keys,
                            std::mt19937& rng) {
  for (int head = 0; head < kHeads; ++head)
    for (int row = 0; row < 7; ++row)
      for (int tile = 0; tile < tiles; ++tile)
        if (row % 2 == 0 ? rng() % 8 != 0 : rng() % 20 == 0)
          bitmap::set(&selected[head * tiles + (of_keys ? tile : row)], of_keys ? row : tile);
}

// The keys that a token of a head attends, by where they begin, and their weights before division
// by the sum.
struct Attended {
  std::vector<std::pair<int, double>> weights;
  double sum = 0;

  Attended(const Grid& grid,
           const uint32_t* selected,  // of the head: [tiles]
           int token,
           const double* query,  // [D]
           const std::vector<double>& keys,
           float scale) {
    const uint32_t* row = &selected[grid.tile_of(token)];
    for (int j = 0; j < grid.num_tokens(); ++j) {
      if (!bitmap::test(row, grid.tile_of(j))) continue;
      weights.push_back({j * D, std::exp(scale * dot(query, &keys[j * D]))});
      sum += weights.back().second;
    }
  }
};

// A call of either direction, with what they share filled in.
template <class Call, class Problem>
Call call_for(Problem& problem) {
  Call call{};
  call.q = problem.q.sequence();
  call.k = problem.k.sequence();
  call.v = problem.v.sequence();
  call.grid = call.kv_grid = problem.grid;
  call.batch = 1;
  call.heads = kHeads;
  call.kv_heads = kKvHeads;
  call.head_dim = D;
  call.dtype = launch::Dtype::Bf16;
  call.scale = problem.scale;
  call.bitmap = problem.selected.data();
  call.query_axes = problem.query_axes;
  return call;
}

template <class Kernel>
void run(const typename Kernel::Params& params, unsigned seed) {
  const int blocks = 1 + static_cast<int>(seed / 2 % 2);
  for (int block = 0; block < blocks; ++block) host::run_block<Kernel>(params, block, blocks, seed);
}

}  // namespace
}  // namespace vsa::test
