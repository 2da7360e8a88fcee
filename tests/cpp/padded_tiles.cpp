// SPDX-License-Identifier: Apache-2.0
// Padded tiles by themselves: where their boxes lie, which rows are tokens, what a TileLoad holds
// of them, and their means, against loops over slots.
//
//   padded_tiles NAMESPACE tiles SEEDS [MUTANT]
//                "seed N: " and the first report within so many seeds, or "nothing"
//
// The namespaces are vsa, or those of VSA_EACH_MUTANT, which tests/mutants/test_padded_tiles.py
// writes.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "kernels/coarse/tile_means.h"
#include "kernels/schedule/tile_schedule.h"
#include "prim/host_block.h"
#include "reports.h"

namespace vsa::test {
namespace {

constexpr int kHeads = 2, kChannels = 4;

struct Problem {
  std::mt19937 rng;
  std::vector<int> sizes;  // as they are given, some out of range

  explicit Problem(unsigned seed) : rng(seed), sizes(1 + below(70)) {
    for (int& size : sizes) {
      const int kinds[] = {0, kTileRows, below(kTileRows + 1), 1, -70000, kTileRows + 6};
      size = kinds[below(6)];
    }
  }
  int below(int end) { return static_cast<int>(rng() % static_cast<unsigned>(end)); }
  int tiles() const { return static_cast<int>(sizes.size()); }
  int real(int tile) const { return std::clamp(sizes[tile], 0, kTileRows); }
  Grid grid() const { return make_grid({tiles(), 1, kTileRows}, {1, 1, kTileRows}); }
};

bool same(const Axes& a, const Axes& b) { return a.t == b.t && a.h == b.h && a.w == b.w; }

// What a load of a tile holds is the tile's number and place.
template <class TileLoad, class Sequence>
void check_load(const Sequence& sequence, int tile) {
  const auto load = TileLoad::of(sequence, tile, 5);
  require(load.flags() == 5, "WRONG FLAGS");
  require(load.tile(sequence) == tile, "WRONG TILE of a load");
  const auto at = sequence.place(tile), again = load.place(sequence);
  require(again.region == at.region && same(again.first, at.first) && again.clip == at.clip,
          "WRONG PLACE of a load");
}

// The box of a tile holds its tokens, and nothing of what comes after them. The map counts slots
// along both w and h, from 63 before the tensor (launch/tensor_map.h).
template <class Sequence>
void check_tile(const Problem& problem, const Sequence& sequence, int tile) {
  const auto at = sequence.place(tile);
  const int real = problem.real(tile), loaded = std::max(real, 1);
  require(at.first.t == tile && at.first.w >= 0 && at.first.h >= 0 && at.text < 0, "WRONG BOX");
  require(at.first.w < kTileRows, "WRONG BOX: nothing of it is in bounds");
  const uint64_t rows = sequence.rows(at, 0);
  require(popcount(rows) == real, "WRONG ROWS: not as many as tokens");
  for (int row = 0; row < kTileRows; ++row) {
    const int slot = at.first.w + row + at.first.h - (kTileRows - 1);
    require(slot == row, "WRONG BOX: it begins at another slot");
    const bool inside = at.first.w + row < kTileRows;  // else it is out of bounds: zeros
    require(inside == (row < loaded), "WRONG BOX: padding is loaded");
    require((rows >> row & 1) == (row < real), "WRONG ROWS: not the first ones");
    require(sequence.token(at, row) == (row < real ? tile * kTileRows + row : -1), "WRONG TOKEN");
  }
  require(sequence.stores_padding(at), "WRONG STORE: padding stays");
  const Axes to = sequence.stored(at).first;
  require(to.t == tile && to.w == 0 && to.h == kTileRows - 1,
          "WRONG STORE: its box holds other slots");
  require(sequence.readable_token(at) == tile * kTileRows, "WRONG READABLE TOKEN");
}

template <class Means, class Params, class Sizes>
void check_means(Problem& problem) {
  const Grid grid = problem.grid();
  const int tokens = grid.num_tokens(), stride = kHeads * kChannels;
  std::vector<float> data(tokens * stride), means(problem.tiles() * stride, NAN);
  std::normal_distribution<float> normal;
  for (int token = 0; token < tokens; ++token)
    for (int i = 0; i < stride; ++i)
      data[token * stride + i] =
          token % kTileRows < problem.real(token / kTileRows) ? normal(problem.rng) : NAN;
  Params p{};
  auto& x = p.tensors[0];
  x.data = data.data();
  x.batch_stride = int64_t{tokens} * stride;
  x.token_stride = stride;
  x.head_stride = kChannels;
  x.grid = grid;
  x.sizes = Sizes{problem.sizes.data()};
  for (int row = 0; row < kTileRows; ++row) x.row_offsets[row] = row * stride;
  x.heads = kHeads;
  x.means = means.data();
  x.lanes = int64_t{problem.tiles()} * kHeads;
  p.count = 1;
  p.head_dim = kChannels;
  for (int64_t lane = 0; lane < x.lanes; ++lane) Means::run(p, 0, lane);
  for (int tile = 0; tile < problem.tiles(); ++tile)
    for (int i = 0; i < stride; ++i) {
      double sum = 0;
      for (int slot = 0; slot < problem.real(tile); ++slot)
        sum += data[(tile * kTileRows + slot) * stride + i];
      const int head = i / kChannels, channel = i % kChannels;
      const float mean = means[(head * problem.tiles() + tile) * kChannels + channel];
      const double wanted = problem.real(tile) > 0 ? sum / problem.real(tile) : 0;
      require(std::abs(mean - wanted) < 1e-5, "WRONG MEANS");
    }
}

#ifndef VSA_EACH_MUTANT
#define VSA_EACH_MUTANT(TILES) TILES(vsa)
#endif

std::string answer(const std::string& space, const std::string& problem, unsigned seeds) {
#define VSA_TILES(name)                                                                         \
  if (space == #name && problem == "tiles")                                                     \
    return first_of(seeds, [](unsigned seed) {                                                  \
      Problem problem(seed);                                                                    \
      const auto padded = name::paddable({problem.grid(), 0, nullptr}, {problem.sizes.data()}); \
      for (int tile = 0; tile < problem.tiles(); ++tile) {                                      \
        check_tile(problem, padded, tile);                                                      \
        check_load<name::TileLoad>(padded, tile);                                               \
      }                                                                                         \
      /* A video with text around it is what it was. */                                         \
      const Grid grid = make_grid({5, 6, 1 + problem.below(40)}, {4, 4, 4}, 70, 3);             \
      const name::TiledSequence tiled = {grid, 3, nullptr};                                     \
      const auto video = name::paddable(tiled, {nullptr});                                      \
      for (int tile = 0; tile < video.num_tiles(); ++tile) {                                    \
        check_load<name::TileLoad>(tiled, tile);                                                \
        check_load<name::TileLoad>(video, tile);                                                \
        require(same(video.place(tile).first, tiled.place(tile).first), "WRONG VIDEO");         \
        for (int row = 0; row < kTileRows; ++row)                                               \
          require(video.token(video.place(tile), row) == tiled.token(tiled.place(tile), row),   \
                  "WRONG VIDEO");                                                               \
      }                                                                                         \
      check_means<name::TileMeans<float, kChannels>, name::TileMeansParams, name::TileSizes>(   \
          problem);                                                                             \
    });
  VSA_EACH_MUTANT(VSA_TILES)
  return "?";
}

}  // namespace
}  // namespace vsa::test

int main(int argc, char** argv) {
  if (argc == 5) vsa::test::mutant = std::stoi(argv[4]);
  std::puts(argc >= 4 ? vsa::test::answer(argv[1], argv[2], std::stoul(argv[3])).c_str() : "?");
}
