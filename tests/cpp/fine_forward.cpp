// SPDX-License-Identifier: Apache-2.0
// Runs the fine forward on the emulator, on a small problem per schedule seed, and holds its output
// and log-sum-exp against fp64.
//
//   fine_forward NAMESPACE forward|uneven|gated SEEDS [MUTANT]
//                "seed N: " and the first report within so many seeds, or "nothing"
//
// By turns in one ring and in two. Uneven: some consumers want nearly all tiles, others few, far
// apart. Gated: the output is twice the fine stage's, which is written as well. The namespaces are
// vsa, or those of VSA_EACH_MUTANT, which the tests of tests/mutants write: one with a kernel that
// behaves as the mutant of a number, others with one mutant each.
#include <cstdio>

#include "fine_problem.h"

namespace vsa::test {
namespace {

struct Problem {
  const Grid grid;
  const int tokens = grid.num_tokens(), tiles = grid.num_tiles();
  const float scale = 1 / std::sqrt(static_cast<float>(D));
  Tensor q{tokens, kHeads}, k{tokens, kKvHeads}, v{tokens, kKvHeads}, out{tokens, kHeads};
  Tensor fine{tokens, kHeads};
  const float gate = 2;
  Sums wanted{tokens, kHeads};
  int tile_counter = 0;
  std::vector<float> lse;          // [heads, tokens]
  std::vector<double> wanted_lse;  // likewise
  std::vector<uint32_t> selected;  // [heads, tiles]
  // In one layer both axes give the same order.
  int query_axes[kHeads] = {kAlongT, kAlongW};

  Problem(Selection selection, unsigned seed)
      : grid(selection == Selection::Random ? kFewTiles : kManyTiles),
        lse(kHeads * tokens, NAN),
        wanted_lse(kHeads * tokens, -INFINITY),
        selected(kHeads * tiles) {
    std::mt19937 rng(seed);
    for (Tensor* x : {&q, &k, &v}) x->draw(rng);
    if (selection == Selection::Random)
      select(selected, tiles, seed, rng);
    else
      select_unevenly(selected, tiles, false, rng);
    attend();
  }

  // Token by token.
  void attend() {
    const std::vector<double> q = this->q.wide(), k = this->k.wide(), v = this->v.wide();
    for (int head = 0; head < kHeads; ++head) {
      for (int i = 0; i < tokens; ++i) {
        const int at = (i * kHeads + head) * D;
        auto [weights, sum] = Attended(grid, &selected[head * tiles], i, &q[at], k, scale);
        for (const auto& [key, weight] : weights) wanted.add(at, weight / sum, &v[key]);
        if (sum > 0) wanted_lse[head * tokens + i] = std::log(sum);
      }
    }
  }

  // What is wrong, if anything is.
  const char* wrong(bool gated) const {
    if (!wanted.agrees(gated ? fine : out)) return gated ? "fine" : "out";
    const std::vector<double> single = fine.wide(), twice = out.wide();
    for (int i = 0; gated && i < tokens * kHeads * D; ++i)
      if (twice[i] != gate * single[i]) return "out";
    for (size_t i = 0; i < lse.size(); ++i)
      if (!(lse[i] == wanted_lse[i] || std::abs(lse[i] - wanted_lse[i]) < 1e-4)) return "lse";
    return nullptr;
  }

  launch::FineForward call(bool gated) {
    auto call = call_for<launch::FineForward>(*this);
    call.out = out.sequence();
    if (gated) call.fine = fine.sequence(), call.gates.fine = {&gate, true, 0, 0, 0, 0};
    call.lse = lse.data();
    call.tile_counter = &tile_counter;
    return call;
  }
};

// What only kernels of 128 channels have, at D: a ring for each of K and V, and queries in
// registers.
template <template <class, int> class Config, int Loads>
struct AsOf128 : Tight<Config, 128, Loads> {
  static_assert(Config<Element, 128>::kHeldChannels > 0);
  static constexpr int kHeldChannels = 16;
};

// Throws what is wrong.
template <class Kernel, class TightKernel>
void check(Selection selection, unsigned seed) {
  constexpr bool kGated = std::is_same_v<typename Kernel::Params, GatedForwardParams>;
  Problem problem(selection, seed);
  typename Kernel::Params params;
  const std::string error = make_params(params, problem.call(kGated), launch::encode_for_emulator);
  require(error.empty(), error);
  seed % 2 == 0 ? run<Kernel>(params, seed) : run<TightKernel>(params, seed);
  const char* wrong = problem.wrong(kGated);
  require(wrong == nullptr, std::string("WRONG NUMBERS in ") + (wrong ? wrong : ""));
}

template <template <class...> class Kernel, class Epilogue, class Config, class TightConfig>
std::string first_report(Selection selection, unsigned seeds) {
  return first_of(seeds, [=](unsigned seed) {
    check<Kernel<Config, Epilogue>, Kernel<TightConfig, Epilogue>>(selection, seed);
  });
}

#ifndef VSA_EACH_MUTANT
#define VSA_EACH_MUTANT(FORWARD, UNEVEN, GATED) FORWARD(vsa) UNEVEN(vsa) GATED(vsa)
#endif

std::string answer(const std::string& space, const std::string& lists, unsigned seeds) {
#define VSA_LISTS(name, called, Output, selection, ...) \
  if (space == #name && lists == called)                \
    return first_report<name::FineForward, Output, __VA_ARGS__>(Selection::selection, seeds);
#define VSA_FORWARD(name)                                                              \
  VSA_LISTS(name, "forward", PlainOutput, Random, name::FineForwardConfig<Element, D>, \
            AsOf128<name::FineForwardConfig, kFewLoads>)
#define VSA_UNEVEN(name)                                  \
  VSA_LISTS(name, "uneven", PlainOutput, UnevenQueries,   \
            Tight<name::FineForwardConfig, 64, kWindows>, \
            AsOf128<name::FineForwardConfig, kWindows>)
#define VSA_GATED(name)                                                              \
  VSA_LISTS(name, "gated", GatedOutput, Random, name::FineForwardConfig<Element, D>, \
            AsOf128<name::FineForwardConfig, kFewLoads>)
  VSA_EACH_MUTANT(VSA_FORWARD, VSA_UNEVEN, VSA_GATED)
  return "?";
}

}  // namespace
}  // namespace vsa::test

int main(int argc, char** argv) {
  if (argc == 5) vsa::test::mutant = std::stoi(argv[4]);
  std::puts(argc >= 4 ? vsa::test::answer(argv[1], argv[2], std::stoul(argv[3])).c_str() : "?");
}
