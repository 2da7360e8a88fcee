// SPDX-License-Identifier: Apache-2.0
// Kernels under a mask over tiles against the definition in plain loops: what a rule says of every
// pair of tiles, what rows keep and weigh, and products without what nobody may choose.
//
//   masked NAMESPACE rule|select|product SEEDS [MUTANT]    "seed N: " and the first report within
//                                                          so many, or "nothing"
//
// The namespaces are vsa, or those of VSA_EACH_MUTANT, which tests/mutants/test_masked.py writes.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "kernels/coarse/float_product.h"
#include "kernels/select/select_tiles.h"
#include "kernels/select/softmax_rows.h"
#include "mask_rules.h"
#include "prim/host_block.h"
#include "reports.h"

namespace vsa::test {
namespace {

// Runs are what may be chosen and gaps are the rest, each column once.
template <class Runs, class May>
void check_runs(const Runs& runs, int columns, May may) {
  std::vector<int> in_runs(static_cast<size_t>(columns), 0), in_gaps = in_runs;
  const auto count = [](std::vector<int>& to, auto run) {
    for (int j = run.first; j < run.after; ++j) ++to.at(static_cast<size_t>(j));
  };
  runs.each_run([&](auto run) { count(in_runs, run); });
  runs.each_gap([&](auto run) { count(in_gaps, run); });
  int all = 0;
  for (int j = 0; j < columns; ++j) {
    const int may_choose = may(j) ? 1 : 0;
    all += may_choose;
    require(in_runs[static_cast<size_t>(j)] == may_choose, "WRONG RUNS");
    require(in_gaps[static_cast<size_t>(j)] == 1 - may_choose, "WRONG RUNS");
  }
  for (int j = 0; j < columns + 70; ++j) require(runs.has(j) == may(j), "WRONG TILES");
  require(runs.count() == all, "WRONG RUNS");
}

template <class Space>
std::string rules(unsigned seeds) {
  return first_of(seeds, [](unsigned seed) {
    Random random{std::mt19937(seed)};
    const Rule rule(random);
    const auto made = Space::rule(rule.n);
    typename Space::Mask mask = {made, nullptr, 0, rule.queries(), rule.keys()};
    for (int row = 0; row < 2 * rule.queries(); ++row) {
      const typename Space::Allowed allowed(mask, row);
      const auto may = [&](int j) { return j < rule.keys() && rule.may(row % rule.queries(), j); };
      for (int j = 0; j < rule.keys() + 70; ++j) require(allowed.has(j) == may(j), "WRONG TILES");
      if (mask.has_runs()) check_runs(typename Space::Runs(mask, row), rule.keys(), may);
    }
    for (int s = 0; s < rule.n[1]; ++s) {
      bool seen = false;
      for (int t = 0; t < rule.n[0]; ++t) seen = seen || rule.layers(t + rule.n[4], s);
      require(made.sees(s) == seen, "WRONG LAYERS");
    }
    for (int i = 0; i < 20; ++i) {
      const int first = random.below(2 * rule.queries()), key = random.below(rule.keys());
      const int rows = 1 + random.below(rule.queries() + 3);
      const int keys = 1 + random.below(rule.keys() - key);
      bool meets = false;
      for (int row = first; row < first + rows; ++row)
        for (int j = key; j < key + keys; ++j)
          meets = meets ||
                  rule.layers(row % rule.queries() / rule.plane() + rule.n[4], j / rule.plane());
      require(made.meets({first, first + rows}, {key, key + keys}) == meets, "WRONG BLOCKS");
    }
  });
}

// Some rows of scores, of several heads.
template <class Space>
struct Selection {
  Random random;
  const Rule rule;
  const int heads, tiles, columns, words;
  std::vector<uint32_t> allowed, must, bitmap;
  std::vector<float> scores, weights;
  typename Space::Params p{};

  explicit Selection(unsigned seed)
      : random{std::mt19937(seed)},
        rule(random),
        heads(1 + random.below(3)),
        tiles(rule.queries()),
        columns(rule.keys()),
        words((columns + 31) / 32) {
    const bool of_heads = random.coin(), bits = random.coin();
    const int rows = heads * tiles;
    if (bits) {
      allowed.assign(static_cast<size_t>((of_heads ? heads : 1) * tiles * words), 0);
      fill(allowed, [&] { return random.rng() & random.rng(); });
      p.mask.allowed = allowed.data();
      p.mask.heads = of_heads ? heads : 1;
    } else {
      p.mask.rule = Space::rule(rule.n);
    }
    p.mask.query_tiles = tiles;
    p.mask.columns = columns;
    if (random.coin()) {
      must.assign(static_cast<size_t>(tiles * words), 0);
      fill(must, [&] { return random.rng() & random.rng() & random.rng(); });
      p.must = must.data();
    }
    p.first_row = random.below(rows);
    p.rows = rows - p.first_row;
    p.columns = columns;
    p.query_tiles = tiles;
    p.num_counts = of_heads ? heads : 1;
    for (int head = 0; head < p.num_counts; ++head) {
      p.counts[head] = 1 + random.below(columns);
      p.shares[head] = random.coin() ? 0 : (1 + random.below(100)) / 100.;
    }
    p.mass = random.coin() ? 0 : (1 + random.below(100)) / 100.;
    scores.resize(static_cast<size_t>(p.rows * columns));
    const auto draw = [&] {
      const float x = static_cast<float>(random.below(21) - 10) / (random.coin() ? 1.f : 3.f);
      return random.below(12) != 0 ? x : random.coin() ? NAN : -INFINITY;
    };
    for (float& x : scores) x = draw();
    if (random.below(4) == 0) {  // one score, whose weights make up a mass to the last bit
      std::fill(scores.begin(), scores.end(), random.coin() ? draw() : -INFINITY);
      std::fill_n(p.counts, p.num_counts, 1);
      std::fill_n(p.shares, p.num_counts, 0);
      p.mass = 0.5;
    }
    weights.assign(scores.size(), 7);
    bitmap.assign(static_cast<size_t>(p.rows * words), ~0u);
    p.scores = scores.data();
    p.weights = weights.data();
    p.bitmap = bitmap.data();
  }

  // Spare bits are zero.
  template <class Fn>
  void fill(std::vector<uint32_t>& bits, Fn word) const {
    for (size_t i = 0; i < bits.size(); ++i) {
      const int in_last = columns % 32;
      const bool last = static_cast<int>(i) % words == words - 1 && in_last > 0;
      bits[i] = static_cast<uint32_t>(word()) & (last ? (1u << in_last) - 1 : ~0u);
    }
  }

  static bool bit(const uint32_t* row, int j) { return (row[j / 32] >> j % 32 & 1) != 0; }

  bool may(int row, int j) const {
    const int number = p.first_row + row, tile = number % tiles;
    if (p.mask.allowed == nullptr) return rule.may(tile, j);
    return bit(p.mask.allowed + (number / tiles % p.mask.heads * tiles + tile) * words, j);
  }

  // Best first: forced tiles, then by falling score, equal ones by rising number.
  std::vector<int> order(int row, int& forced) const {
    std::vector<int> found;
    const float* x = scores.data() + row * columns;
    const auto number = [&](int j) { return std::isnan(x[j]) ? -INFINITY : x[j]; };
    const auto is_forced = [&](int j) {
      return p.must != nullptr && bit(p.must + (p.first_row + row) % tiles * words, j);
    };
    for (int j = 0; j < columns; ++j)
      if (may(row, j)) found.push_back(j);
    std::stable_sort(found.begin(), found.end(), [&](int a, int b) {
      return is_forced(a) != is_forced(b) ? is_forced(a) : number(a) > number(b);
    });
    forced = static_cast<int>(std::count_if(found.begin(), found.end(), is_forced));
    return found;
  }

  int wanted(int row, const std::vector<int>& found, int forced) const {
    const int head = (p.first_row + row) / tiles % p.num_counts;
    const int may_choose = static_cast<int>(found.size());
    int count = p.counts[head];
    if (p.shares[head] > 0)
      count = std::max(1, static_cast<int>(std::ceil(may_choose * p.shares[head])));
    count = std::max(std::min(count, may_choose), forced);
    if (p.mass == 0) return count;
    const float* x = scores.data() + row * columns;
    float top = -INFINITY;
    for (int j : found) top = std::max(top, std::isnan(x[j]) ? -INFINITY : x[j]);
    std::vector<uint64_t> sums = {0};
    for (int j : found) {
      const float score = std::isnan(x[j]) ? -INFINITY : x[j];
      sums.push_back(sums.back() + vsa::softmax_weight(score == top ? 0 : top - score));
    }
    const auto target = static_cast<uint64_t>(std::ceil(static_cast<double>(sums.back()) * p.mass));
    while (sums[static_cast<size_t>(count)] < target) ++count;
    return count;
  }

  void check(int row) const {
    int forced = 0;
    const std::vector<int> found = order(row, forced);
    const int count = wanted(row, found, forced);
    std::vector<uint32_t> bits(static_cast<size_t>(words), 0);
    for (int i = 0; i < count; ++i) bits[found[i] / 32] |= 1u << found[i] % 32;
    require(std::equal(bits.begin(), bits.end(), bitmap.data() + row * words), "WRONG CHOICE");
    float sum = 0;
    bool number = true;
    for (int j = 0; j < columns; ++j) {
      const float weight = weights[static_cast<size_t>(row * columns + j)];
      if (!may(row, j)) require(weight == 0, "WRONG WEIGHTS");
      number = number && !std::isnan(weight);
      sum += weight;
    }
    require(!number || found.empty() || std::abs(sum - 1) < 1e-4f, "WRONG WEIGHTS");
  }
};

template <class Space>
std::string selections(unsigned seeds) {
  return first_of(seeds, [](unsigned seed) {
    Selection<Space> problem(seed);
    const auto run = [&]<class Kernel>() {
      for (int row = 0; row < problem.p.rows; ++row) Kernel::run(problem.p, row);
    };
    const bool longer = seed % 3 == 0;
    const auto of_length = [&]<class Short, class Long>() {
      longer ? run.template operator()<Long>() : run.template operator()<Short>();
    };
    const bool runs = problem.p.mask.has_runs();
    if (problem.p.mass > 0)
      runs ? of_length.template operator()<typename Space::RunsMass, typename Space::RunsLongMass>()
           : of_length.template operator()<typename Space::Mass, typename Space::LongMass>();
    else
      runs ? of_length
                 .template operator()<typename Space::RunsCount, typename Space::RunsLongCount>()
           : of_length.template operator()<typename Space::Count, typename Space::LongCount>();
    for (int row = 0; row < problem.p.rows; ++row) problem.check(row);
  });
}

// Small whole numbers, whose sums are exact; NaN where no step may look.
template <class Space>
std::string products(unsigned seeds) {
  return first_of(seeds, [](unsigned seed) {
    Random random{std::mt19937(seed)};
    // Once more steps than are looked at together, of which few are there.
    const bool is_long = seed == 5;
    const Rule rule = is_long ? Rule::of_layers(36, random) : Rule(random);
    const int side = static_cast<int>(seed % 3);
    const int first = is_long ? 0 : random.below(rule.queries()), heads = is_long ? 1 : 2;
    const int matrices = is_long ? 1 : 1 + random.below(2);
    const int other = !is_long && random.coin() ? 70 : 17;
    const int queries = heads * rule.queries() - first, keys = rule.keys();
    const int rows = side == 2 ? keys : queries;
    const int columns = side == 0 ? keys : other;
    const int depth = side == 0 ? other : side == 1 ? keys : queries;
    std::vector<float> left(static_cast<size_t>(matrices * rows * depth));
    std::vector<float> right(static_cast<size_t>(matrices * columns * depth));
    std::vector<float> out(static_cast<size_t>(matrices * rows * columns), 7.f);
    for (float& x : left) x = static_cast<float>(random.below(9) - 4);
    for (float& x : right) x = static_cast<float>(random.below(9) - 4);
    // Whether blocks of 64 queries and keys meet, each from a multiple of 64 on.
    std::vector<char> met(static_cast<size_t>(((queries + 63) / 64) * ((keys + 63) / 64)), 0);
    const auto meet = [&](int query, int key) -> char& {
      return met[static_cast<size_t>(query / 64 * ((keys + 63) / 64) + key / 64)];
    };
    for (int i = 0; i < queries; ++i)
      for (int j = 0; j < keys; ++j)
        if (rule.layers((first + i) % rule.queries() / rule.plane() + rule.n[4], j / rule.plane()))
          meet(i, j) = 1;
    typename Space::ProductParams params{};
    auto& to = params.products[0];
    to.left = {left.data(), int64_t{rows} * depth, depth, 1, false};
    to.right = {right.data(), int64_t{columns} * depth, depth, 1, false};
    to.out = {out.data(), int64_t{rows} * columns, columns, 1, false};
    to.rows = rows;
    to.columns = columns;
    to.depth = depth;
    to.scale = 1;
    to.blocks = matrices * to.row_tiles() * to.column_tiles();
    params.rule = Space::rule(rule.n);
    params.first_query = first;
    params.sides[0] = static_cast<typename Space::ProductSides>(side);
    // Steps that are left out hold NaN for the rows of a block that do not meet them, but a step
    // is read for a block of rows as a whole.
    for (int r = 0; r < matrices * rows; ++r)
      for (int k = 0; k < depth; ++k)
        if ((side == 1 && !meet(r % rows, k)) || (side == 2 && !meet(k, r % rows)))
          left[r * depth + k] = NAN;
    for (int block = 0; block < to.blocks; ++block)
      host::run_warpgroup_block<typename Space::Product>(params, block, to.blocks, seed + block);
    for (int r = 0; r < matrices * rows; ++r)
      for (int c = 0; c < columns; ++c) {
        const float* of_left = left.data() + r * depth;
        const float* of_right = right.data() + (r / rows * columns + c) * depth;
        float sum = 0;
        for (int k = 0; k < depth; ++k)
          if (!std::isnan(of_left[k])) sum += of_left[k] * of_right[k];
        if (side == 0 && !meet(r % rows, c)) sum = 7;
        require(out[static_cast<size_t>(r * columns + c)] == sum, "WRONG NUMBERS");
      }
  });
}

#ifndef VSA_EACH_MUTANT
#define VSA_EACH_MUTANT(RULE, SELECT, PRODUCT) RULE(vsa) SELECT(vsa) PRODUCT(vsa)
#endif

// What a namespace calls its kernels.
#define VSA_SPACE(name)                                                                          \
  struct Space {                                                                                 \
    using Mask [[maybe_unused]] = name::TileMask;                                                \
    using Allowed [[maybe_unused]] = name::AllowedTiles;                                         \
    using Runs [[maybe_unused]] = name::AllowedRuns;                                             \
    using Params [[maybe_unused]] = name::MaskedSelectParams;                                    \
    using Count [[maybe_unused]] = name::SelectTiles<16, false, false, name::AllowedTiles>;      \
    using Mass [[maybe_unused]] = name::SelectTiles<16, false, true, name::AllowedTiles>;        \
    using LongCount [[maybe_unused]] = name::SelectTiles<2, true, false, name::AllowedTiles>;    \
    using LongMass [[maybe_unused]] = name::SelectTiles<2, true, true, name::AllowedTiles>;      \
    using RunsCount [[maybe_unused]] = name::SelectTiles<16, false, false, name::AllowedRuns>;   \
    using RunsMass [[maybe_unused]] = name::SelectTiles<16, false, true, name::AllowedRuns>;     \
    using RunsLongCount [[maybe_unused]] = name::SelectTiles<2, true, false, name::AllowedRuns>; \
    using RunsLongMass [[maybe_unused]] = name::SelectTiles<2, true, true, name::AllowedRuns>;   \
    using Product [[maybe_unused]] = name::FloatProduct<false, true>;                            \
    using ProductParams [[maybe_unused]] = name::MaskedProductParams;                            \
    using ProductSides [[maybe_unused]] = name::Sides;                                           \
    static auto rule(const int (&n)[12]) { return name::make_rule(n); }                          \
  };

std::string answer(const std::string& space, const std::string& problem, unsigned seeds) {
#define VSA_RULE(name)                          \
  if (space == #name && problem == "rule") {    \
    VSA_SPACE(name) return rules<Space>(seeds); \
  }
#define VSA_SELECT(name)                             \
  if (space == #name && problem == "select") {       \
    VSA_SPACE(name) return selections<Space>(seeds); \
  }
#define VSA_PRODUCT(name)                          \
  if (space == #name && problem == "product") {    \
    VSA_SPACE(name) return products<Space>(seeds); \
  }
  VSA_EACH_MUTANT(VSA_RULE, VSA_SELECT, VSA_PRODUCT)
  return "?";
}

}  // namespace
}  // namespace vsa::test

int main(int argc, char** argv) {
  if (argc == 5) vsa::test::mutant = std::stoi(argv[4]);
  std::puts(argc >= 4 ? vsa::test::answer(argv[1], argv[2], std::stoul(argv[3])).c_str() : "?");
}
