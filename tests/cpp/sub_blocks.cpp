// SPDX-License-Identifier: Apache-2.0
// Means of runs of random tokens, and scores of random rows, against sums in double precision. What
// lies around and between what is asked for is NaN, and around results must stay.
//
//   sub_blocks NAMESPACE means|scores SEEDS [MUTANT]    "seed N: " and the first report within so
//                                                       many, or "nothing"
//
// The namespaces are vsa, or those of VSA_EACH_MUTANT, which tests/mutants/test_sub_blocks.py
// writes: one with a kernel that behaves as the mutant of a number, others with one mutant each.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "kernels/coarse/run_means.h"
#include "kernels/coarse/sub_block_scores.h"
#include "prim/host_block.h"
#include "reports.h"

namespace vsa::test {
namespace {

constexpr float kAround = 7;  // what lies around results
constexpr int kPast = 1024;   // rows past the last one, for mutants that write there

struct Random {
  std::mt19937 rng;
  int below(int end) { return static_cast<int>(rng() % static_cast<unsigned>(end)); }
};

double widened(uint16_t bits) { return host::widen(Fp16{}, bits); }
uint16_t rounded(float x) { return static_cast<uint16_t>(pack<Fp16>(x, 0) & 0xffff); }

// Runs of a tile of so many tokens: how many, and where the next begins.
int runs_of(int tokens, int runs) { return std::min(tokens, runs); }
int begin_of(int tokens, int runs, int run) {
  return run * (tokens / runs) + std::min(run, tokens % runs);
}

// ---- means --------------------------------------------------------------------------------------

template <int D>
struct Tokens {
  const Grid grid;
  const int batch, heads, runs, slots;
  const bool are_keys;
  const int64_t head_stride = D + 8, token_stride = heads * head_stride;
  const int64_t batch_stride = grid.num_tokens() * token_stride;
  const int heads_in_all = batch * heads, tiles = grid.num_tiles();
  std::vector<uint16_t> numbers, rows;
  std::vector<float> factors, means;

  Tokens(Random& random, int runs, int slots, bool are_keys)
      : grid(make_grid({1 + random.below(5), 1 + random.below(6), 1 + random.below(7)},
                       random.below(2) == 0 ? Axes{4, 4, 4} : Axes{2, 3, 4},
                       random.below(3))),
        batch(1 + random.below(2)),
        heads(1 + random.below(2)),
        runs(runs),
        slots(slots),
        are_keys(are_keys),
        numbers(static_cast<size_t>(batch * batch_stride), 0x7fff),
        rows((static_cast<size_t>(are_keys ? runs::key_blocks(tiles, slots) * kTileRows
                                           : tiles * slots) *
                  static_cast<size_t>(heads_in_all) +
              kPast) *
                 D,
             0x7fff),
        factors(rows.size() / D, NAN),
        means(static_cast<size_t>(heads_in_all * tiles * D + 1), kAround) {
    // One channel is far from the others, so that a scale that forgets it would not do.
    const auto normal = [&] { return static_cast<float>(random.below(2001) - 1000) / 512; };
    each_token([&](int b, int h, int, int, int64_t first) {
      const float offset = (b + h) % 2 == 0 ? -20000.f : 3.f;
      for (int c = 0; c < D; ++c)
        numbers[static_cast<size_t>(first + c)] = rounded(normal() + (c == D - 3 ? offset : 0));
    });
  }
  template <class Fn>
  void each_token(Fn fn) {
    for (int b = 0; b < batch; ++b)
      for (int h = 0; h < heads; ++h)
        for (int tile = 0; tile < tiles; ++tile)
          for (int row = 0; row < grid.tile.volume(); ++row)
            if (const int token = grid.token(grid.place(tile), row); token >= 0)
              fn(b, h, tile, token, b * batch_stride + h * head_stride + token * token_stride);
  }

  template <class Params>
  Params params() {
    Params p{};
    auto& x = p.tensors[0];
    x.data = numbers.data();
    x.batch_stride = batch_stride;
    x.token_stride = token_stride;
    x.head_stride = head_stride;
    x.grid = grid;
    for (int row = 0; row < grid.tile.volume(); ++row) {
      const Axes at = row_offset(grid.tile, row);
      x.row_offsets[row] = ((at.t * grid.video.h + at.h) * grid.video.w + at.w) * token_stride;
    }
    x.heads = heads;
    x.means = means.data();
    x.rows = reinterpret_cast<unsigned char*>(rows.data());
    x.factors = factors.data();
    x.are_keys = are_keys;
    x.warps = int64_t{heads_in_all} * tiles;
    p.count = 1;
    p.runs = runs;
    p.slots = slots;
    return p;
  }

  // What a slot's row stands for, and its factor.
  double number(int head, int tile, int slot, int channel, float& factor) const {
    const int in_block = runs::block_tiles(slots);
    const int64_t block = int64_t{head} * runs::key_blocks(tiles, slots) + tile / in_block;
    const int64_t row = (int64_t{head} * tiles + tile) * slots + slot;
    const auto at = runs::lane_quad(tile % in_block, slot, slots);
    const int64_t byte =
        are_keys ? block * kTileRows * D * 2 +
                       runs::image_byte(runs::key_row(tile % in_block, slot, slots), channel)
                 : (row * D + channel) * 2;
    factor = factors[static_cast<size_t>(
        are_keys ? block * kTileRows + runs::factor_place(at, slot % 4) : row)];
    return widened(rows[static_cast<size_t>(byte / 2)]) * factor;
  }

  void check() {
    std::vector<std::vector<int64_t>> tokens(static_cast<size_t>(heads_in_all * tiles));
    each_token([&](int b, int h, int tile, int, int64_t first) {
      tokens[static_cast<size_t>((b * heads + h) * tiles + tile)].push_back(first);
    });
    require(means.back() == kAround, "WRONG NUMBERS: past the means");
    for (int head = 0; head < heads_in_all; ++head)
      for (int tile = 0; tile < tiles; ++tile)
        for (int channel = 0; channel < D; ++channel) {
          const auto& own = tokens[static_cast<size_t>(head * tiles + tile)];
          const int size = static_cast<int>(own.size());
          const auto mean = [&](int begin, int end) {
            double sum = 0;
            for (int i = begin; i < end; ++i)
              sum += widened(numbers[static_cast<size_t>(own[static_cast<size_t>(i)] + channel)]);
            return sum / (end - begin);
          };
          const auto near = [](double x, double y, double by) {
            return std::abs(x - y) <= by * (std::abs(y) + 1e-3);  // NaN is near nothing
          };
          require(near(means[static_cast<size_t>((head * tiles + tile) * D + channel)],
                       mean(0, size), 1e-5),
                  "WRONG NUMBERS: the mean of a tile");
          for (int slot = 0; slot < slots; ++slot) {
            float factor = 0;
            const double x = number(head, tile, slot, channel, factor);
            if (slot >= runs_of(size, runs)) {
              require(factor < 0 && x == 0, "WRONG NUMBERS: an empty slot");
              continue;
            }
            const double truth = mean(begin_of(size, runs, slot), begin_of(size, runs, slot + 1));
            require(factor > 0 && near(x, truth, 1. / 2048), "WRONG NUMBERS: the mean of a run");
          }
        }
  }
};

template <class Kernel, class Params, class Given>
void run_means(Given tokens) {
  const Params params = tokens.template params<Params>();
  for (int64_t warp = 0; warp < params.tensors[0].warps; ++warp) Kernel::run(params, 0, warp);
  tokens.check();
}

template <template <class, int, bool> class Kernel, class Params>
std::string first_report_of_means(unsigned seeds) {
  return first_of(seeds, [](unsigned seed) {
    Random random{std::mt19937(seed)};
    const int slots = 4 << random.below(3), runs = 1 + random.below(slots);
    const bool keys = random.below(2) == 0;
    if (random.below(2) == 0)
      run_means<Kernel<Fp16, 64, true>, Params>(Tokens<64>(random, runs, slots, keys));
    else
      run_means<Kernel<Fp16, 128, false>, Params>(Tokens<128>(random, runs, slots, keys));
  });
}

// ---- scores -------------------------------------------------------------------------------------

template <class Kernel, class Params, bool Empties>
void check_scores(Random& random, unsigned seed) {
  constexpr int D = Kernel::D, kSlots = Kernel::kSlots;
  const int matrices = 1 + random.below(2), rows = 1 + random.below(80);
  const int columns = 1 + random.below(9 * Kernel::kBlockTiles);
  const int blocks = runs::key_blocks(columns, kSlots);
  const float scale = random.below(2) == 0 ? 0.5f : -0.25f;
  std::vector<uint16_t> queries(static_cast<size_t>(matrices * rows * kSlots * D), 0x7fff);
  std::vector<uint16_t> keys(static_cast<size_t>(matrices * blocks * kTileRows * D), 0x7fff);
  std::vector<float> query_factors(queries.size() / D, NAN), key_factors(keys.size() / D, NAN);
  std::vector<float> scores(static_cast<size_t>((matrices * rows + 1) * columns + 1), kAround);
  const auto slots_of = [&](int tile) { return Empties ? 1 + tile * 5 % kSlots : kSlots; };

  // A few channels of each row, so that scores are large and of either sign.
  const auto number = [&](int channel) {
    return channel % 8 == 0 ? static_cast<float>(random.below(65) - 32) : 0.f;
  };
  const auto factor = [&] { return std::ldexp(1.f, random.below(4) - 3); };
  const auto fill_rows = [&](int tiles, auto place, auto factor_of) {
    for (int m = 0; m < matrices; ++m)
      for (int tile = 0; tile < tiles; ++tile)
        for (int slot = 0; slot < kSlots; ++slot) {
          const bool there = slot < slots_of(tile);
          factor_of(m, tile, slot) = there ? factor() : -1.f;
          for (int c = 0; c < D; ++c)
            place(m, tile, slot, c) = there ? rounded(number(c)) : uint16_t{0};
        }
  };
  const auto query = [&](int m, int tile, int slot, int c) -> uint16_t& {
    return queries[static_cast<size_t>(((m * rows + tile) * kSlots + slot) * D + c)];
  };
  const auto query_factor = [&](int m, int tile, int slot) -> float& {
    return query_factors[static_cast<size_t>((m * rows + tile) * kSlots + slot)];
  };
  constexpr int kTiles = Kernel::kBlockTiles;
  const auto key = [&](int m, int tile, int slot, int c) -> uint16_t& {
    const int64_t image = int64_t{m} * blocks + tile / kTiles;
    return keys[static_cast<size_t>(
        image * kTileRows * D +
        runs::image_byte(runs::key_row(tile % kTiles, slot, kSlots), c) / 2)];
  };
  const auto key_factor = [&](int m, int tile, int slot) -> float& {
    const auto at = runs::lane_quad(tile % kTiles, slot, kSlots);
    return key_factors[static_cast<size_t>((m * blocks + tile / kTiles) * kTileRows +
                                           runs::factor_place(at, slot % 4))];
  };
  fill_rows(rows, query, query_factor);
  fill_rows(columns, key, key_factor);

  Params p{};
  p.queries = reinterpret_cast<const unsigned char*>(queries.data());
  p.query_factors = query_factors.data();
  // Copies want aligned memory.
  std::vector<unsigned char> room(keys.size() * 2 + 16);
  auto* aligned = room.data() + (16 - reinterpret_cast<uintptr_t>(room.data()) % 16) % 16;
  std::copy_n(reinterpret_cast<const unsigned char*>(keys.data()), keys.size() * 2, aligned);
  std::vector<float> factor_room(key_factors.size() + 4);
  auto* aligned_factors =
      factor_room.data() + (16 - reinterpret_cast<uintptr_t>(factor_room.data()) % 16) % 16 / 4;
  std::copy(key_factors.begin(), key_factors.end(), aligned_factors);
  p.keys = aligned;
  p.key_factors = aligned_factors;
  p.scores = scores.data();
  p.rows = rows;
  p.columns = columns;
  p.row_groups = ceil_div(rows, Kernel::kRowTiles * Kernel::kConsumers);
  const int each = ceil_div(blocks, 1 + random.below(3));
  p.parts = ceil_div(blocks, each);
  p.scale = scale;
  const int count = matrices * p.row_groups * p.parts;
  for (int block = 0; block < count; ++block)
    host::run_block<Kernel>(p, block, count, seed + static_cast<unsigned>(block));

  for (size_t i = static_cast<size_t>(matrices * rows * columns); i < scores.size(); ++i)
    require(scores[i] == kAround, "WRONG NUMBERS: past the scores");
  for (int m = 0; m < matrices; ++m)
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < columns; ++j) {
        std::vector<double> products;
        for (int a = 0; a < slots_of(i); ++a)
          for (int b = 0; b < slots_of(j); ++b) {
            double sum = 0;
            for (int c = 0; c < D; c += 8)
              sum += widened(query(m, i, a, c)) * widened(key(m, j, b, c));
            products.push_back(scale * sum * query_factor(m, i, a) * key_factor(m, j, b));
          }
        const double top = *std::max_element(products.begin(), products.end());
        double total = 0;
        for (const double x : products) total += std::exp(x - top);
        const double truth = top + std::log(total);
        const double found = scores[static_cast<size_t>((m * rows + i) * columns + j)];
        require(std::abs(found - truth) <= 1e-5 * std::abs(truth) + 1e-5, "WRONG NUMBERS");
      }
}

template <template <int, int, bool> class Kernel, class Params>
std::string first_report_of_scores(unsigned seeds) {
  return first_of(seeds, [](unsigned seed) {
    Random random{std::mt19937(seed)};
    switch (seed % 4) {
      case 0:
        return check_scores<Kernel<64, 1, false>, Params, false>(random, seed);
      case 1:
        return check_scores<Kernel<64, 1, true>, Params, true>(random, seed);
      case 2:
        return check_scores<Kernel<128, 2, true>, Params, true>(random, seed);
      default:
        return check_scores<Kernel<64, 4, true>, Params, true>(random, seed);
    }
  });
}

#ifndef VSA_EACH_MUTANT
#define VSA_EACH_MUTANT(MEANS, SCORES) MEANS(vsa) SCORES(vsa)
#endif

std::string answer(const std::string& space, const std::string& problem, unsigned seeds) {
#define VSA_MEANS(name)                     \
  if (space == #name && problem == "means") \
    return first_report_of_means<name::RunMeans, name::RunMeansParams>(seeds);
#define VSA_SCORES(name)                     \
  if (space == #name && problem == "scores") \
    return first_report_of_scores<name::SubBlockScores, name::SubBlockScoresParams>(seeds);
  VSA_EACH_MUTANT(VSA_MEANS, VSA_SCORES)
  return "?";
}

}  // namespace
}  // namespace vsa::test

int main(int argc, char** argv) {
  if (argc == 5) vsa::test::mutant = std::stoi(argv[4]);
  std::puts(argc >= 4 ? vsa::test::answer(argv[1], argv[2], std::stoul(argv[3])).c_str() : "?");
}
