// SPDX-License-Identifier: Apache-2.0
// Lets a few blocks take all work tiles of random sequences, and holds what they get against what
// there is to do.
//
//   work_list NAMESPACE list SEEDS [MUTANT]     "seed N: " and the first report within so many, or
//                                               "nothing"
//   work_list NAMESPACE "counter not zero" ...  the same with a counter that a launch before left
//
// The namespaces are vsa, or those of VSA_EACH_MUTANT, which tests/mutants/test_work_list.py
// writes: one with a list that behaves as the mutant of a number, others with one mutant each.
#include "kernels/schedule/work_list.h"

#include <algorithm>
#include <cstdio>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "prim/host_block.h"
#include "reports.h"

namespace vsa::test {
namespace {

struct Problem {
  std::mt19937 rng;
  const int consumers, batch, heads;
  const TiledSequence sequence;
  std::vector<int> axes;  // [batch, heads]
  bool ordered;
  std::vector<int> order;  // [batch, heads, groups] where that is so
  int long_ones;           // of each head, first of all heads
  int tile_counter = 0;

  explicit Problem(unsigned seed)
      : rng(seed),
        consumers(1 + below(4)),
        batch(1 + below(3)),
        heads(1 + below(4)),
        sequence{make_grid({1 + below(9), 1 + below(9), 1 + below(20)}, {4, 4, 4}, 0, 0), below(9),
                 nullptr} {
    for (int i = 0; i < batch * heads; ++i) axes.push_back(below(4));
    ordered = below(2) == 0;
    long_ones = ceil_div(sequence.text_tiles, consumers);
    if (!ordered) return;
    long_ones += below(groups() - long_ones + 1);
    for (int i = 0; i < batch * heads; ++i) {
      std::vector<int> of_head(static_cast<size_t>(groups()));
      std::iota(of_head.begin(), of_head.end(), 0);
      std::shuffle(of_head.begin(), of_head.end(), rng);
      order.insert(order.end(), of_head.begin(), of_head.end());
    }
  }

  int groups() const { return ceil_div(sequence.num_tiles(), consumers); }
  // Where a group comes among those of its head.
  int rank(int batch_index, int head, int group) const {
    if (!ordered) return group;
    const auto of_head = order.begin() + (batch_index * heads + head) * groups();
    return static_cast<int>(std::find(of_head, of_head + groups(), group) - of_head);
  }

  int below(int end) { return static_cast<int>(rng() % static_cast<unsigned>(end)); }
};

// A block of which only the scheduler warp does anything.
template <class List, class Tile>
struct Taking {
  static constexpr int kConsumers = 1, kThreads = (1 + kConsumers) * kWarpgroupThreads;
  static constexpr int kProducers = 1;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 24;

  struct Params {
    Problem& problem;
    std::vector<Tile>& taken;
  };
  struct SharedMemory {};

  static void init_barriers(SharedMemory&) {}
  static void prologue(const Params&, SharedMemory&, int, int) {}
  static void schedule(const Params& p, SharedMemory&) {
    Problem& problem = p.problem;
    const int* order = problem.ordered ? problem.order.data() : nullptr;
    const List list(problem.sequence, problem.consumers, problem.batch, problem.heads,
                    problem.axes.data(), {order, problem.ordered ? &problem.long_ones : nullptr});
    list.take_each(&problem.tile_counter, problem.consumers,
                   [&](const Tile& work) { p.taken.push_back(work); });
  }
  static void produce(const Params&, SharedMemory&, int) {}
  static void consume(const Params&, SharedMemory&, int) {}
};

template <class Tile>
void check(const Problem& problem, const std::vector<Tile>& taken) {
  std::set<std::tuple<int, int, int>> seen;
  bool others = false;  // than the long ones
  std::tuple<int, int, int> before = {};
  for (const Tile& work : taken) {
    const int rank = problem.rank(work.batch, work.head, work.first_place / problem.consumers);
    const std::tuple<int, int, int> item = {work.batch, work.head, rank};
    require(work.batch >= 0 && work.batch < problem.batch && work.head >= 0 &&
                work.head < problem.heads && work.first_place >= 0 &&
                work.first_place < problem.sequence.num_tiles() &&
                work.first_place % problem.consumers == 0,
            "WRONG WORK TILE: there is none like it");
    require(seen.insert(item).second, "WRONG WORK TILE: it comes twice");
    require(work.axis == problem.axes[work.batch * problem.heads + work.head], "WRONG AXIS");
    const bool is_long = rank < problem.long_ones;
    require(!(is_long && others), "WRONG ORDER: a long one comes late");
    const bool begins = seen.size() == 1 || others == is_long;
    require(begins || item > before, "WRONG ORDER: of heads or within one");
    others = !is_long;
    before = item;
  }
  const int groups = ceil_div(problem.sequence.num_tiles(), problem.consumers);
  require(static_cast<int>(seen.size()) == problem.batch * problem.heads * groups,
          "WRONG WORK TILE: one is missing");
}

// tile_counter: what it is before there are any blocks
template <class List, class Tile>
std::string first_report(unsigned seeds, int tile_counter = 0) {
  return first_of(seeds, [=](unsigned seed) {
    Problem problem(seed);
    problem.tile_counter = tile_counter;
    std::vector<Tile> of_block[2], taken;
    for (int block = 0; block < 2; ++block)
      host::run_block<Taking<List, Tile>>({problem, of_block[block]}, block, 2, seed);
    for (size_t i = 0; i < of_block[0].size() + of_block[1].size(); ++i)
      taken.push_back(of_block[i % 2].at(i / 2));
    check(problem, taken);
  });
}

#ifndef VSA_EACH_MUTANT
#define VSA_EACH_MUTANT(LIST) LIST(vsa)
#endif

std::string answer(const std::string& space, const std::string& problem, unsigned seeds) {
  if (problem != "list" && problem != "counter not zero") return "?";
  const int tile_counter = problem == "list" ? 0 : 3;
#define VSA_LIST(name) \
  if (space == #name) return first_report<name::WorkList, name::WorkTile>(seeds, tile_counter);
  VSA_EACH_MUTANT(VSA_LIST)
  return "?";
}

}  // namespace
}  // namespace vsa::test

int main(int argc, char** argv) {
  if (argc == 5) vsa::test::mutant = std::stoi(argv[4]);
  std::puts(argc >= 4 ? vsa::test::answer(argv[1], argv[2], std::stoul(argv[3])).c_str() : "?");
}
