// SPDX-License-Identifier: Apache-2.0
// What callers of the drop-ins keep, and scores of empty tiles, against plain loops.
//
//   kept_tiles NAMESPACE kept|wrong|hidden SEEDS [MUTANT]    "seed N: " and the first report within
//                                                            so many, or "nothing"
//
// kept: bitmaps, lengths and sizes of parts, from lists, maps and bitmaps. wrong: a size, a count
// or a tile that no caller may pass is noticed, what is not read is not. The namespaces are vsa, or
// those of VSA_EACH_MUTANT, which tests/mutants/test_kept_tiles.py writes.
#include "kernels/select/kept_tiles.h"

#include <algorithm>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "prim/host_block.h"
#include "reports.h"

namespace vsa::test {
namespace {

constexpr int kAround = 77;  // of what must not be written
constexpr int kUnread = -9;  // in lists, past a row's count

struct Problem {
  std::mt19937 rng;
  int parts, query_tiles, rows, columns, width;
  bool all_rows;                        // of the queries are real
  std::vector<std::vector<char>> kept;  // [rows][columns]
  std::vector<int> sizes, kv_sizes, lists, counts;
  std::vector<uint8_t> map;
  std::vector<uint32_t> words;

  explicit Problem(unsigned seed) : rng(seed) {
    const int of_tile[] = {1, 2, 4};
    parts = of_tile[below(3)];
    query_tiles = 1 + below(4);
    rows = query_tiles * (1 + below(4));
    columns = 1 + below(below(4) == 0 ? 2200 : 70);
    all_rows = below(2) == 0;
    const int slots = parts * kTileRows;
    const auto size = [&] { return below(3) == 0 ? 0 : below(3) == 0 ? slots : below(slots + 1); };
    for (int i = 0; i < query_tiles; ++i) sizes.push_back(size());
    for (int i = 0; i < columns; ++i) kv_sizes.push_back(size());
    kept.assign(static_cast<size_t>(rows), std::vector<char>(static_cast<size_t>(columns)));
    words.assign(static_cast<size_t>(rows * bitmap::words(columns)), 0);
    width = 2 * columns;
    for (int row = 0; row < rows; ++row) add_row(row);
  }

  int below(int end) { return static_cast<int>(rng() % static_cast<unsigned>(end)); }

  // Which the lists name in any order, some of them twice.
  void add_row(int row) {
    const int share = below(4);
    std::vector<int> list;
    for (int column = 0; column < columns; ++column) {
      const bool is = below(3) < share;
      kept[row][column] = is;
      map.push_back(is);
      if (!is) continue;
      words[row * bitmap::words(columns) + column / kWordBits] |= 1u << column % kWordBits;
      list.insert(list.end(), static_cast<size_t>(1 + (below(5) == 0)), column);
    }
    std::shuffle(list.begin(), list.end(), rng);
    counts.push_back(static_cast<int>(list.size()));
    list.resize(static_cast<size_t>(width), kUnread);
    lists.insert(lists.end(), list.begin(), list.end());
  }

  int real(const std::vector<int>& of, int tile, int part) const {
    return std::clamp(of[tile] - part * kTileRows, 0, kTileRows);
  }
};

enum Form { kLists, kMap, kWords, kForms };

template <class Space>
void check(unsigned seed) {
  Problem problem(seed);
  const int parts = problem.parts, rows = problem.rows * parts;
  const int columns = problem.columns * parts, words = bitmap::words(columns);
  for (int form = 0; form < kForms; ++form) {
    std::vector<uint32_t> target(static_cast<size_t>(rows * words + 1), kAround);
    std::vector<int> lengths(static_cast<size_t>(rows + 1), kAround);
    std::vector<int> part_sizes(static_cast<size_t>(columns + 1), kAround);
    const bool wants = form != kMap;  // lengths and sizes of parts
    typename Space::Params p = {};
    if (form == kLists) p.lists = problem.lists.data(), p.counts = problem.counts.data();
    if (form == kMap) p.map = problem.map.data();
    if (form == kWords) p.words = problem.words.data();
    p.sizes = problem.all_rows ? nullptr : problem.sizes.data();
    p.kv_sizes = problem.kv_sizes.data();
    p.bitmap = target.data();
    p.lengths = wants ? lengths.data() : nullptr;
    p.part_sizes = wants ? part_sizes.data() : nullptr;
    p.rows = problem.rows, p.query_tiles = problem.query_tiles;
    p.columns = problem.columns, p.width = problem.width, p.parts = parts;
    for (int row = 0; row < p.rows; ++row) Space::Kept::run(p, row);
    for (int row = 0; row < rows; ++row) {
      const int own = row / parts, tile = own % problem.query_tiles;
      const bool asks = problem.all_rows || problem.real(problem.sizes, tile, row % parts) > 0;
      int length = 0;
      for (int bit = 0; bit < words * kWordBits; ++bit) {
        const int column = bit / parts;
        const bool is = asks && bit < columns && problem.kept[own][column] &&
                        problem.real(problem.kv_sizes, column, bit % parts) > 0;
        require(bitmap::test(target.data() + row * words, bit) == is, "WRONG BITS");
        length += is;
      }
      require(lengths[row] == (wants ? length : kAround), "WRONG LENGTH");
    }
    for (int tile = 0; tile < columns; ++tile)
      require(part_sizes[tile] ==
                  (wants ? problem.real(problem.kv_sizes, tile / parts, tile % parts) : kAround),
              "WRONG SIZE OF A PART");
    require(target.back() == kAround && lengths.back() == kAround && part_sizes.back() == kAround,
            "TOO MUCH WRITTEN");
  }
}

// One number is wrong: it must be noticed.
template <class Space>
void check_wrong(unsigned seed) {
  Problem problem(seed);
  problem.all_rows = false;
  const int slots = problem.parts * kTileRows;
  const bool low = problem.below(2) == 0;
  switch (problem.below(4)) {
    case 0:
      problem.sizes[problem.below(problem.query_tiles)] = low ? -1 : slots + 1;
      break;
    case 1:
      problem.kv_sizes[problem.below(problem.columns)] = low ? -1 : slots + 1;
      break;
    case 2:
      problem.counts[problem.below(problem.rows)] = low ? -1 : problem.width + 1;
      break;
    default: {
      const int row = problem.below(problem.rows);
      if (problem.counts[row] == 0) problem.counts[row] = 1;
      const int at = row * problem.width + problem.below(problem.counts[row]);
      problem.lists[at] = low ? -1 : problem.columns;
    }
  }
  const int words = bitmap::words(problem.columns * problem.parts);
  std::vector<uint32_t> target(static_cast<size_t>(problem.rows * problem.parts * words));
  typename Space::Params p = {};
  p.lists = problem.lists.data(), p.counts = problem.counts.data();
  p.sizes = problem.sizes.data(), p.kv_sizes = problem.kv_sizes.data();
  p.bitmap = target.data();
  p.rows = problem.rows, p.query_tiles = problem.query_tiles;
  p.columns = problem.columns, p.width = problem.width, p.parts = problem.parts;
  try {
    for (int row = 0; row < p.rows; ++row) Space::Kept::run(p, row);
  } catch (const host::Hazard&) {
    return;
  }
  require(false, "WRONG NUMBER TAKEN");
}

template <class Space>
void check_hidden(unsigned seed) {
  Problem problem(seed);
  const auto columns = static_cast<size_t>(problem.columns);
  std::vector<int> sizes;
  for (int size : problem.kv_sizes) sizes.push_back(std::min(size, kTileRows));
  std::vector<float> scores;
  for (size_t i = 0; i < columns * static_cast<size_t>(problem.rows); ++i)
    scores.push_back(static_cast<float>(problem.below(1000)) - 500.f);
  std::vector<float> expected = scores;
  for (size_t i = 0; i < expected.size(); ++i)
    if (sizes[i % columns] == 0) expected[i] = -1e30f;
  typename Space::EmptyParams p = {scores.data(), sizes.data(), problem.rows, problem.columns};
  for (int row = 0; row < p.rows; ++row) Space::Empty::run(p, row);
  require(scores == expected, "WRONG SCORES");
  sizes[static_cast<size_t>(problem.below(problem.columns))] = kTileRows + 1;
  try {
    Space::Empty::run(p, 0);
  } catch (const host::Hazard&) {
    return;
  }
  require(false, "WRONG NUMBER TAKEN");
}

#ifndef VSA_EACH_MUTANT
#define VSA_EACH_MUTANT(KEPT, WRONG, HIDDEN) KEPT(vsa) WRONG(vsa) HIDDEN(vsa)
#endif

std::string answer(const std::string& space, const std::string& problem, unsigned seeds) {
#define VSA_SPACE(name)                                         \
  struct Space {                                                \
    using Params [[maybe_unused]] = name::KeptTilesParams;      \
    using Kept [[maybe_unused]] = name::KeptTiles;              \
    using EmptyParams [[maybe_unused]] = name::HideEmptyParams; \
    using Empty [[maybe_unused]] = name::HideEmpty;             \
  };
#define VSA_CASE(name, word, check)        \
  if (space == #name && problem == word) { \
    VSA_SPACE(name)                        \
    return first_of(seeds, check<Space>);  \
  }
#define VSA_KEPT(name) VSA_CASE(name, "kept", check)
#define VSA_WRONG(name) VSA_CASE(name, "wrong", check_wrong)
#define VSA_HIDDEN(name) VSA_CASE(name, "hidden", check_hidden)
  VSA_EACH_MUTANT(VSA_KEPT, VSA_WRONG, VSA_HIDDEN)
  return "?";
}

}  // namespace
}  // namespace vsa::test

int main(int argc, char** argv) {
  if (argc == 5) vsa::test::mutant = std::stoi(argv[4]);
  std::puts(argc >= 4 ? vsa::test::answer(argv[1], argv[2], std::stoul(argv[3])).c_str() : "?");
}
