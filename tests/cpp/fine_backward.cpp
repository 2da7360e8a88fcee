// SPDX-License-Identifier: Apache-2.0
// Runs a pass of the fine backward on the emulator, on a small problem per schedule seed, and holds
// its gradients against fp64.
//
//   fine_backward NAMESPACE [uneven_]keys|queries|one_pass SEEDS [MUTANT]
//                 "seed N: " and the first report within so many seeds, or "nothing"
//
// By turns in one ring and in two. Uneven: some consumers want nearly all of many tiles, others
// few, far apart. The namespaces are vsa, or those of VSA_EACH_MUTANT, which the tests of
// tests/mutants write: one with kernels that behave as the mutant of a number, others with one
// mutant each.
#include <cstdio>

#include "fine_problem.h"

namespace vsa::test {
namespace {

// Resident tiles where they are not by default: in registers or in shared memory.
template <template <class, int> class Config, int RingsOf, int Loads>
struct TightKeys : Tight<Config, RingsOf, Loads> {
  static constexpr bool kKeysInRegisters = !Config<Element, D>::kKeysInRegisters;
};
template <template <class, int> class Config, int RingsOf, int Loads>
struct TightQueries : Tight<Config, RingsOf, Loads> {
  static constexpr bool kQueriesInRegisters = !Config<Element, D>::kQueriesInRegisters;
};

// One dS at a time.
template <template <class, int> class Config, template <int, int> class Sums_, int Loads>
struct TightOnePass : TightKeys<Config, 64, Loads> {
  using Sums = Sums_<2, 1>;
};

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
  int tile_counter[2] = {};
  std::vector<RowStats> stats;
  std::vector<float> grad_q_sums;  // [heads, tiles, 64 * D]

  Problem(Selection selection, unsigned seed)
      : grid(selection == Selection::Random ? kFewTiles : kManyTiles),
        selected(kHeads * tiles),
        transposed(kHeads * tiles),
        order(ceil_div(tiles, launch::kKeyTilesPerGroup)),
        stats(kHeads * tiles),
        grad_q_sums(kHeads * tiles * kTileRows * D) {
    std::mt19937 rng(seed);
    for (RowStats& tile : stats) std::fill_n(tile.lse, kTileRows, INFINITY);  // weighs nothing
    for (Tensor* x : {&q, &k, &v, &grad_out}) x->draw(rng);
    if (seed % 3 == 1) lower_scores();
    if (selection == Selection::Random)
      select(selected, tiles, seed, rng);
    else
      select_unevenly(selected, tiles, selection == Selection::UnevenKeys, rng);
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

  // The forward pass and the gradients, token by token.
  void attend() {
    const std::vector<double> q = this->q.wide(), k = this->k.wide(), v = this->v.wide(),
                              grad_out = this->grad_out.wide();
    for (int head = 0; head < kHeads; ++head) {
      for (int i = 0; i < tokens; ++i) {
        const int at = (i * kHeads + head) * D;
        auto [weights, sum] = Attended(grid, &selected[head * tiles], i, &q[at], k, scale);
        std::vector<double> mean(D);
        for (auto& [key, weight] : weights) {
          weight /= sum;
          add_product(mean.data(), weight, &v[key]);
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
  const char* wrong_of_one_pass() const {
    const char* of_keys = wrong_of_keys();
    return of_keys != nullptr ? of_keys : wrong_of_queries();
  }

  launch::FineBackward call() {
    auto call = call_for<launch::FineBackward>(*this);
    call.grad_fine = grad_out.sequence();
    call.grad_q = grad_q.sequence();
    call.grad_k = grad_k.sequence();
    call.grad_v = grad_v.sequence();
    call.transposed_bitmap = transposed.data();
    call.key_axes = key_axes;
    call.key_order = order.data();
    call.tile_counters = tile_counter;
    call.row_stats = stats.data();
    call.grad_q_sums = grad_q_sums.data();
    return call;
  }
};

// The end of one pass: dQ as it is stored.
void round_sums(const RoundSumsParams& p) {
  for (int head = 0; head < p.heads; ++head)
    for (int tile = 0; tile < p.queries.num_tiles(); ++tile)
      for (int thread = 0; thread < RoundSums<Element>::kThreads; ++thread)
        RoundSums<Element>::rows(p, 0, head, tile, thread);
}

// Throws what is wrong.
template <class Kernel, class TightKernel>
void check(Selection selection, unsigned seed, const char* (Problem::*wrong)() const) {
  Problem problem(selection, seed);
  FineBackwardParams params;
  const launch::FineBackward call = problem.call();
  const std::string error = make_params(params, call, launch::encode_for_emulator);
  require(error.empty(), error);
  seed % 2 == 0 ? run<Kernel>(params, seed) : run<TightKernel>(params, seed);
  if (has_reducer<Kernel>()) round_sums(launch::round_sums_params(call, params));
  const char* gradient = (problem.*wrong)();
  require(gradient == nullptr, std::string("WRONG NUMBERS in ") + (gradient ? gradient : ""));
}

template <template <class> class Kernel, class Config, class TightConfig>
std::string first_report(Selection selection,
                         unsigned seeds,
                         const char* (Problem::*wrong)() const) {
  return first_of(seeds, [=](unsigned seed) {
    check<Kernel<Config>, Kernel<TightConfig>>(selection, seed, wrong);
  });
}

#ifndef VSA_EACH_MUTANT
#define VSA_EACH_MUTANT(KEYS, QUERIES, ONE_PASS, UNEVEN_KEYS, UNEVEN_QUERIES, UNEVEN_ONE_PASS) \
  KEYS(vsa)                                                                                    \
  QUERIES(vsa) ONE_PASS(vsa) UNEVEN_KEYS(vsa) UNEVEN_QUERIES(vsa) UNEVEN_ONE_PASS(vsa)
#endif

std::string answer(const std::string& space, const std::string& pass, unsigned seeds) {
#define VSA_PASS(name, called, Kernel, selection, wrong, ...) \
  if (space == #name && pass == called)                       \
    return first_report<name::Kernel, __VA_ARGS__>(Selection::selection, seeds, &Problem::wrong);
#define VSA_KEYS(name)                                            \
  VSA_PASS(name, "keys", FineBackwardKeys, Random, wrong_of_keys, \
           name::FineBackwardKeysConfig<Element, D>,              \
           TightKeys<name::FineBackwardKeysConfig, 128, kFewLoads>)
#define VSA_QUERIES(name)                                                  \
  VSA_PASS(name, "queries", FineBackwardQueries, Random, wrong_of_queries, \
           name::FineBackwardQueriesConfig<Element, D>,                    \
           TightQueries<name::FineBackwardQueriesConfig, 128, kFewLoads>)
#define VSA_ONE_PASS(name)                                                \
  VSA_PASS(name, "one_pass", FineBackwardKeys, Random, wrong_of_one_pass, \
           name::FineBackwardOnePassConfig<Element, D>,                   \
           TightOnePass<name::FineBackwardOnePassConfig, name::QuerySums, kFewLoads>)
#define VSA_UNEVEN_ONE_PASS(name)                                                    \
  VSA_PASS(name, "uneven_one_pass", FineBackwardKeys, UnevenKeys, wrong_of_one_pass, \
           name::FineBackwardOnePassConfig<Element, D>,                              \
           TightOnePass<name::FineBackwardOnePassConfig, name::QuerySums, kWindows>)
#define VSA_UNEVEN_KEYS(name)                                                \
  VSA_PASS(name, "uneven_keys", FineBackwardKeys, UnevenKeys, wrong_of_keys, \
           TightKeys<name::FineBackwardKeysConfig, 64, kWindows>,            \
           TightKeys<name::FineBackwardKeysConfig, 128, kWindows>)
#define VSA_UNEVEN_QUERIES(name)                                                         \
  VSA_PASS(name, "uneven_queries", FineBackwardQueries, UnevenQueries, wrong_of_queries, \
           TightQueries<name::FineBackwardQueriesConfig, 64, kWindows>,                  \
           TightQueries<name::FineBackwardQueriesConfig, 128, kWindows>)
  VSA_EACH_MUTANT(VSA_KEYS, VSA_QUERIES, VSA_ONE_PASS, VSA_UNEVEN_KEYS, VSA_UNEVEN_QUERIES,
                  VSA_UNEVEN_ONE_PASS)
  return "?";
}

}  // namespace
}  // namespace vsa::test

int main(int argc, char** argv) {
  if (argc == 5) vsa::test::mutant = std::stoi(argv[4]);
  std::puts(argc >= 4 ? vsa::test::answer(argv[1], argv[2], std::stoul(argv[3])).c_str() : "?");
}
