// SPDX-License-Identifier: Apache-2.0
// Runs both passes of the fine backward on the emulator, on a small problem per schedule seed, and
// holds the gradients against fp64. tests/test_backward_bugs.py compiles it against headers that
// have a bug each.
//
//   fine_backward SEEDS    "seed N: " and the first report within so many seeds, or "nothing"
//
// -DVSA_ONLY_KEYS and -DVSA_ONLY_QUERIES leave the other pass out, for the compiler's time.
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

using Keys = FineBackwardKeysConfig<Element, D>;
using Queries = FineBackwardQueriesConfig<Element, D>;
// So few stages that every slot is waited for, and Q and dO where they are not by default.
struct TightKeys : Keys {
  static constexpr int kStages = 3;
};
struct TightQueries : Queries {
  static constexpr int kStages = 3;
  static constexpr bool kQueriesInRegisters = !Queries::kQueriesInRegisters;
};

// [tokens, heads, D], with room after it that no one may write.
struct Tensor {
  int heads;
  std::vector<uint16_t> data;

  explicit Tensor(int heads) : heads(heads), data((kTokens * heads + 1) * D, host::kNan16) {}
  uint16_t* row(int token, int head) { return &data[(token * heads + head) * D]; }
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
  Tensor q{kHeads}, k{kKvHeads}, v{kKvHeads}, out{kHeads}, grad_out{kHeads};
  Tensor grad_q{kHeads}, grad_k{kKvHeads}, grad_v{kKvHeads};
  Sums wanted_q{kHeads}, wanted_k{kKvHeads}, wanted_v{kKvHeads};
  uint32_t selected[kHeads][kTiles] = {}, transposed[kHeads][kTiles] = {};
  int order[kGroups], tickets = 0;
  std::vector<float> lse = std::vector<float>(kHeads * kTokens);
  std::vector<RowStats> stats = std::vector<RowStats>(kHeads * kTiles);

  explicit Problem(unsigned seed) {
    std::mt19937 rng(seed);
    for (Tensor* x : {&q, &k, &v, &grad_out}) x->draw(rng);
    select(seed, rng);
    for (int group = 0; group < kGroups; ++group) order[group] = (group + 1) % kGroups;
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
        for (int c = 0; c < D; ++c) {
          out.row(i, head)[c] = host::narrow(Element{}, static_cast<float>(mean[c]));
          mean[c] = host::widen(Element{}, out.row(i, head)[c]);
        }
        lse[head * kTokens + i] = static_cast<float>(std::log(sum));
        const double delta = dot(&grad_out[at], mean.data());
        for (const auto& [key, weight] : weights) {
          const double grad = weight * (dot(&grad_out[at], &v[key]) - delta) * scale;
          wanted_q.add(at, grad, &k[key]);
          wanted_k.add(key, grad, &q[at]);
          wanted_v.add(key, weight, &grad_out[at]);
        }
      }
    }
  }

  launch::FineBackward call() {
    launch::FineBackward call{};
    call.q = q.sequence();
    call.k = k.sequence();
    call.v = v.sequence();
    call.grad_out = grad_out.sequence();
    call.grad_q = grad_q.sequence();
    call.grad_k = grad_k.sequence();
    call.grad_v = grad_v.sequence();
    call.whole_out = out.view();
    call.whole_grad_out = grad_out.view();
    call.grid = call.kv_grid = kGrid;
    call.batch = 1;
    call.heads = kHeads;
    call.kv_heads = kKvHeads;
    call.head_dim = D;
    call.element = launch::ElementType::Bf16;
    call.scale = scale;
    call.selected = selected[0];
    call.transposed = transposed[0];
    call.order = order;
    call.lse = lse.data();
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

template <class Kernel, class TightKernel>
void run(const FineBackwardParams& params, unsigned seed) {
  const int blocks = 1 + static_cast<int>(seed / 2 % 2);
  for (int block = 0; block < blocks; ++block) {
    if (seed % 2 == 0)
      host::run_block<Kernel>(params, block, blocks, seed);
    else
      host::run_block<TightKernel>(params, block, blocks, seed);
  }
}

// What is wrong, or nothing.
std::string report(unsigned seed) {
  Problem problem(seed);
  const launch::FineBackward call = problem.call();
  FineBackwardParams params;
  if (const std::string error = make_params(params, call, encode); !error.empty()) return error;
  for (int head = 0; head < kHeads; ++head)
    for (int tile = 0; tile < kTiles; ++tile)
      for (int row = 0; row < kTileRows; ++row)
        write_row_stats<Element, D>(row_stats_params(call), 0, head, tile, row, [](auto part) {
          float sum = 0;
          for (int lane = 0; lane < kWarpThreads; ++lane) sum += part(lane);
          return sum;
        });
  try {
#ifndef VSA_ONLY_QUERIES
    run<FineBackwardKeys<Keys>, FineBackwardKeys<TightKeys>>(params, seed);
    if (!problem.wanted_k.agrees(problem.grad_k)) return "WRONG NUMBERS in dk";
    if (!problem.wanted_v.agrees(problem.grad_v)) return "WRONG NUMBERS in dv";
#endif
#ifndef VSA_ONLY_KEYS
    run<FineBackwardQueries<Queries>, FineBackwardQueries<TightQueries>>(params, seed);
    if (!problem.wanted_q.agrees(problem.grad_q)) return "WRONG NUMBERS in dq";
#endif
  } catch (const host::Hazard& hazard) {
    return hazard.what();
  }
  return "";
}

std::string first_report(unsigned seeds) {
  for (unsigned seed = 0; seed < seeds; ++seed)
    if (const std::string text = report(seed); !text.empty())
      return "seed " + std::to_string(seed) + ": " + text;
  return "nothing";
}

}  // namespace
}  // namespace vsa::test

int main(int argc, char** argv) {
  std::puts(argc == 2 ? vsa::test::first_report(std::stoul(argv[1])).c_str() : "?");
}
