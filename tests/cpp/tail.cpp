// SPDX-License-Identifier: Apache-2.0
// Runs a kernel of the tail on the emulator, on a small problem per schedule seed, and holds what
// it makes against fp64.
//
//   tail NAMESPACE forward|gated|means|queries SEEDS [MUTANT]
//        "seed N: " and the first report within so many seeds, or "nothing"
//
// By turns with the stages of the kernel and with as few as it may have. Gated: the output is twice
// that of the softmax, which is written as well. The namespaces are vsa, or those of
// VSA_EACH_MUTANT, which the tests of tests/mutants write: one with kernels that behave as the
// mutant of a number, others with one mutant each.
#include <cstdio>

#include "fine_problem.h"
#include "launch/tail_params.h"

namespace vsa::test {
namespace {

// Three chunks of means, the last one of 22, and a tile of one token among those of two.
constexpr Grid kKeys = make_grid({1, 1, 299}, {1, 1, 2});
constexpr int kMeans = kKeys.num_tiles(), kPadded = 192, kWords = bitmap::words(kMeans);
static_assert(kMeans == 150 && kKvHeads == 1, "means are those of one key head");

struct Problem {
  const Grid grid = kFewTiles;
  const int tokens = grid.num_tokens(), tiles = grid.num_tiles();
  const float scale = 1 / std::sqrt(static_cast<float>(D));
  Tensor q{tokens, kHeads}, out{tokens, kHeads}, fine{tokens, kHeads};
  Tensor k{kKeys.num_tokens(), kKvHeads}, v{kKeys.num_tokens(), kKvHeads};  // never read
  Tensor grad_out{tokens, kHeads}, grad_q{tokens, kHeads};
  Tensor mean_k{kMeans, kKvHeads}, mean_k_low{kMeans, kKvHeads}, mean_v{kMeans, kKvHeads};
  std::vector<float> bias = std::vector<float>(kPadded, NAN);
  std::vector<uint32_t> selected;  // [heads, tiles, words]
  std::vector<float> lse;          // [heads, tokens]
  std::vector<double> wanted_lse;  // likewise
  std::vector<RowStats> stats;
  const int splits;
  std::vector<float> parts, sum_k, sum_v;
  Sums wanted_out{tokens, kHeads}, wanted_q{tokens, kHeads};
  Sums wanted_k{kMeans, kKvHeads}, wanted_v{kMeans, kKvHeads};
  const float gate = 2;
  int query_axes[kHeads] = {};

  explicit Problem(unsigned seed)
      : selected(kHeads * tiles * kWords),
        lse(kHeads * tokens),
        stats(kHeads * tiles),
        splits(1 + static_cast<int>(seed % 3)),
        parts((splits * 2 * kMeans + kTileRows) * D, NAN),  // with room that no one may write
        sum_k(kMeans * D, 1.f),
        sum_v(kMeans * D, 1.f) {
    std::mt19937 rng(seed);
    for (RowStats& tile : stats) {
      std::fill_n(tile.lse, kTileRows, INFINITY);  // weighs nothing
      std::fill_n(tile.delta, kTileRows, 0.f);
    }
    for (Tensor* x : {&q, &out, &grad_out, &grad_q}) x->draw(rng);
    draw_means(rng);
    select(seed, rng);
    attend(seed, rng);
  }

  void draw_means(std::mt19937& rng) {
    std::normal_distribution<float> normal;
    std::vector<float> keys(kMeans * D), values(kMeans * D);
    for (auto* x : {&keys, &values})
      for (float& number : *x) number = normal(rng);
    launch::RoundMeans call{
        keys.data(),
        values.data(),
        {mean_k.data.data(), mean_k_low.data.data(), mean_v.data.data(), bias.data()},
        kKeys,
        1,
        kKvHeads,
        D,
        launch::Dtype::Bf16};
    const RoundMeansParams params = launch::round_means_params(call);
    for (int64_t lane = 0; lane < launch::lanes(params); ++lane)
      RoundMeans<Element>::run(params, lane);
  }

  // Some rows choose nothing, all tiles, or all of a chunk. With the last kind nothing is chosen
  // either, and a mask hides the first chunk.
  void select(unsigned seed, std::mt19937& rng) {
    for (int row = 0; row < kHeads * tiles; ++row) {
      const unsigned kind = (row + seed) % 7;
      for (int tile = 0; tile < kMeans; ++tile)
        if (kind == 0   ? false
            : kind == 1 ? true
            : kind == 2 ? tile / 64 == 1
            : kind == 3 ? tile < 64
                        : rng() % 4 == 0)
          bitmap::set(&selected[row * kWords], tile);
    }
  }

  // Token by token. What the fine stage has made of it is any numbers; where nothing is chosen, it
  // has made nothing.
  void attend(unsigned seed, std::mt19937& rng) {
    std::normal_distribution<double> normal;
    const std::vector<double> q = this->q.wide(), first = out.wide(), high = mean_k.wide(),
                              low = mean_k_low.wide(), v = mean_v.wide(),
                              grad_out = this->grad_out.wide(), grad_q = this->grad_q.wide();
    std::vector<double> k(high);
    for (int i = 0; i < kMeans * D; ++i) k[i] += low[i];
    wanted_lse.assign(kHeads * tokens, 0);
    for (int head = 0; head < kHeads; ++head) {
      for (int i = 0; i < tokens; ++i) {
        const int at = (i * kHeads + head) * D, tile = grid.tile_of(i);
        const unsigned kind = (head * tiles + tile + seed) % 7;
        const bool nothing = kind == 0 || kind == 3;
        const double of_fine = nothing ? 0 : std::exp2(2 * normal(rng) + 4);
        if (nothing) std::fill_n(&out.data[at], D, host::narrow(Element{}, 0));
        lse[head * tokens + i] = static_cast<float>(std::log(of_fine));
        std::vector<std::pair<int, double>> weights;
        double sum = of_fine;
        for (int j = 0; j < kMeans; ++j) {
          if (bitmap::test(&selected[(head * tiles + tile) * kWords], j)) continue;
          const int size = popcount(kKeys.row_mask(j));
          weights.push_back({j * D, size * std::exp(scale * dot(&q[at], &k[j * D]))});
          sum += weights.back().second;
        }
        if (!nothing) wanted_out.add(at, of_fine / sum, &first[at]);
        wanted_lse[head * tokens + i] = std::log(sum);
        const double delta = normal(rng);
        RowStats& row = stats[head * tiles + tile];
        row.lse[grid.row_of(i)] = static_cast<float>(std::log2(sum));
        row.delta[grid.row_of(i)] = static_cast<float>(delta);
        wanted_q.add(at, 1, &grad_q[at]);
        for (const auto& [key, weight] : weights) {
          const double share = weight / sum;
          const double grad = share * (dot(&grad_out[at], &v[key]) - delta) * scale;
          wanted_out.add(at, share, &v[key]);
          wanted_q.add(at, grad, &k[key]);
          wanted_k.add(key, grad, &q[at]);
          wanted_v.add(key, share, &grad_out[at]);
        }
      }
    }
  }

  // What is wrong, if anything is.
  const char* wrong_of_forward(bool gated) const {
    if (!wanted_out.agrees(gated ? fine : out)) return gated ? "fine" : "out";
    const std::vector<double> single = fine.wide(), twice = out.wide();
    for (int i = 0; gated && i < tokens * kHeads * D; ++i)
      if (twice[i] != gate * single[i]) return "out";
    for (size_t i = 0; i < lse.size(); ++i)
      if (!(std::abs(lse[i] - wanted_lse[i]) < 2e-5)) return "lse";
    return nullptr;
  }
  const char* wrong_of_queries() const { return wanted_q.agrees(grad_q) ? nullptr : "dq"; }
  // Sums were 1 beforehand.
  const char* wrong_of_means() const {
    const auto agree = [](const Sums& wanted, const std::vector<float>& got) {
      for (size_t i = 0; i < got.size(); ++i)
        if (!(std::abs(got[i] - 1 - wanted.value[i]) <= 0x1p-8 * wanted.size[i] + 1e-5))
          return false;
      return true;
    };
    for (size_t i = splits * 2 * kMeans * D; i < parts.size(); ++i)
      if (!std::isnan(parts[i])) return "the room after the parts";
    return !agree(wanted_k, sum_k) ? "dk" : !agree(wanted_v, sum_v) ? "dv" : nullptr;
  }

  template <class Call>
  Call call() {
    Call call = call_for<Call>(*this);
    call.kv_grid = kKeys;
    call.tail = {mean_k.data.data(), mean_k_low.data.data(), mean_v.data.data(), bias.data()};
    return call;
  }
  launch::TailForward forward(bool gated) {
    auto call = this->call<launch::TailForward>();
    call.out = out.sequence();
    if (gated) call.fine = fine.sequence(), call.gates.fine = {&gate, true, 0, 0, 0, 0};
    call.lse = lse.data();
    return call;
  }
  launch::TailBackward backward() {
    auto call = this->call<launch::TailBackward>();
    call.grad_fine = grad_out.sequence();
    call.grad_q = grad_q.sequence();
    call.row_stats = stats.data();
    call.parts = parts.data();
    call.splits = splits;
    call.sum_k = sum_k.data();
    call.sum_v = sum_v.data();
    call.accumulate = true;
    return call;
  }
};

// As few stages as the kernel may have, and queries where they are not by default.
template <template <class, int> class Config>
struct Fewest : Config<Element, D> {
  static constexpr int kStages = 3;
  static constexpr bool kQueriesInRegisters = true;
};

void verdict(const char* wrong) {
  require(wrong == nullptr, std::string("WRONG NUMBERS in ") + (wrong ? wrong : ""));
}

template <class Kernel, class TightKernel, class Params>
void run_either(const Params& params, unsigned seed) {
  seed % 2 == 0 ? run<Kernel>(params, seed) : run<TightKernel>(params, seed);
}

template <class Kernel, class TightKernel>
std::string forward_report(unsigned seeds) {
  return first_of(seeds, [](unsigned seed) {
    constexpr bool kGated =
        std::is_same_v<typename Kernel::Params, TailForwardParams<GatedForwardParams>>;
    Problem problem(seed);
    typename Kernel::Params params;
    const std::string error =
        make_params(params, problem.forward(kGated), launch::encode_for_emulator);
    require(error.empty(), error);
    run_either<Kernel, TightKernel>(params, seed);
    verdict(problem.wrong_of_forward(kGated));
  });
}

template <class Kernel, class TightKernel>
std::string backward_report(unsigned seeds, bool of_means) {
  return first_of(seeds, [=](unsigned seed) {
    Problem problem(seed);
    const launch::TailBackward call = problem.backward();
    TailBackwardParams params;
    const std::string error = make_params(params, call, launch::encode_for_emulator);
    require(error.empty(), error);
    run_either<Kernel, TightKernel>(params, seed);
    if (of_means) {
      const SumPartsParams sums = launch::sum_parts_params(call);
      for (int64_t lane = 0; lane < sums.numbers; ++lane) SumPartsParams::run(sums, lane);
    }
    verdict(of_means ? problem.wrong_of_means() : problem.wrong_of_queries());
  });
}

#ifndef VSA_EACH_MUTANT
#define VSA_EACH_MUTANT(FORWARD, GATED, MEANS, QUERIES) \
  FORWARD(vsa) GATED(vsa) MEANS(vsa) QUERIES(vsa)
#endif

std::string answer(const std::string& space, const std::string& kernel, unsigned seeds) {
#define VSA_FORWARD(name)                                                         \
  if (space == #name && kernel == "forward")                                      \
    return forward_report<name::TailForward<name::TailForwardConfig<Element, D>>, \
                          name::TailForward<Fewest<name::TailForwardConfig>>>(seeds);
#define VSA_GATED(name)                                                                        \
  if (space == #name && kernel == "gated")                                                     \
    return forward_report<name::TailForward<name::TailForwardConfig<Element, D>, GatedOutput>, \
                          name::TailForward<Fewest<name::TailForwardConfig>, GatedOutput>>(seeds);
#define VSA_MEANS(name)                                                                           \
  if (space == #name && kernel == "means")                                                        \
    return backward_report<name::TailBackwardMeans<name::TailBackwardMeansConfig<Element, D>>,    \
                           name::TailBackwardMeans<Fewest<name::TailBackwardMeansConfig>>>(seeds, \
                                                                                           true);
#define VSA_QUERIES(name)                                                                          \
  if (space == #name && kernel == "queries")                                                       \
    return backward_report<name::TailBackwardQueries<name::TailBackwardQueriesConfig<Element, D>>, \
                           name::TailBackwardQueries<Fewest<name::TailBackwardQueriesConfig>>>(    \
        seeds, false);
  VSA_EACH_MUTANT(VSA_FORWARD, VSA_GATED, VSA_MEANS, VSA_QUERIES)
  return "?";
}

}  // namespace
}  // namespace vsa::test

int main(int argc, char** argv) {
  if (argc == 5) vsa::test::mutant = std::stoi(argv[4]);
  std::puts(argc >= 4 ? vsa::test::answer(argv[1], argv[2], std::stoul(argv[3])).c_str() : "?");
}
