// SPDX-License-Identifier: Apache-2.0
// Makes eight bits of random keys and values on a CPU, with clipped tiles, text that is partly
// invalid, and now and then infinity and NaN, and holds every byte of the images against its
// definition.
//
//   quantise_tiles NAMESPACE tiles SEEDS [MUTANT]
//                             "seed N: " and the first report within so many, or "nothing"
//
// The namespaces are vsa, or those of VSA_EACH_MUTANT, which tests/mutants/test_quantise_tiles.py
// writes: one that behaves as the mutant of a number, others with one mutant each.
#include "kernels/coarse/quantise_tiles.h"

#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "prim/host_block.h"
#include "reports.h"

namespace vsa::test {
namespace {

constexpr int D = 64, kHeads = 2, kBatch = 2;
using Element = Bf16;
using Image = QuantisedTile<D>;

struct Problem {
  std::mt19937 rng;
  const TiledSequence keys;
  const int tokens = keys.grid.num_tokens(), tiles = keys.grid.num_tiles() + keys.text_tiles;
  std::vector<uint64_t> text_rows;  // [batch, text tiles]
  std::vector<uint16_t> k, v;       // [batch, tokens, heads, D]
  std::vector<float> channels;      // [batch, heads, 2, D]
  std::vector<unsigned char> images;
  std::vector<HeadRecord<D>> records;
  const int together;

  explicit Problem(unsigned seed)
      : rng(seed),
        keys{make_grid({5, 4, 6}, {4, 4, 4}, 66, 3), 3, nullptr},
        text_rows(kBatch * 3, ~uint64_t{0} >> 62),
        k(kBatch * tokens * kHeads * D),
        v(k.size()),
        channels(kBatch * kHeads * 2 * D, NAN),
        images(size_t{kBatch} * kHeads * tiles * Image::kImageBytes, 0xaa),
        records(kBatch * kHeads),
        together(1 + static_cast<int>(seed % 3)) {
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < k.size(); ++i) {
      k[i] = host::narrow(Element{}, normal(rng) + static_cast<float>(i % D % 7));
      v[i] = host::narrow(Element{}, normal(rng) * static_cast<float>(1 + i % D));
    }
    for (int b = 0; b < kBatch; ++b) {
      text_rows[b * 3] = rng() | 1;
      if (seed % 2) text_rows[b * 3 + 1] = 0;
    }
    // Large numbers in text that is no token, with the next row's.
    for (int row = 0; row < 2; ++row)
      v[at(0, keys.token(keys.place(tiles - 2), row), 0) + 7] = host::narrow(Element{}, 3e4f);
    const_cast<const uint64_t*&>(keys.text_rows) = text_rows.data();
    if (seed % 3 == 1) {
      const uint16_t special = seed % 2 ? 0x7fc0 : 0xff80;  // NaN, minus infinity
      for (std::vector<uint16_t>* x : {&k, &v}) (*x)[rng() % x->size()] = special;
      k[at(0, keys.token(keys.place(3), 0), 1) + 5] = special;  // enters the mean if any does
      // Beside the largest number, which the same lane reads.
      v[at(0, keys.token(keys.place(3), 0), 1) + 5] = special;
      v[at(0, keys.token(keys.place(3), 4), 1) + 5] = host::narrow(Element{}, 3e4f);
    }
  }

  size_t at(int batch, int token, int head) const {
    return ((size_t(batch) * tokens + token) * kHeads + head) * D;
  }
  static float value(const std::vector<uint16_t>& x, size_t i) {
    return host::widen(Element{}, x[i]);
  }

  template <class Params>
  Params params() {
    const int64_t batch = int64_t{tokens} * kHeads * D;
    Params p{};
    p.k = {k.data(), batch, D, kHeads * D};
    p.v = {v.data(), batch, D, kHeads * D};
    p.keys = keys;
    p.batch = kBatch;
    p.heads = kHeads;
    p.together = together;
    p.records = records.data();
    p.channels = channels.data();
    p.images = images.data();
    return p;
  }

  // What is wrong with one head, if anything is.
  template <class Key>
  const char* wrong(int batch, int head) const {
    double sum[D] = {};
    float most[D] = {};
    int count = 0;
    for (int tile = 0; tile < tiles; ++tile) {
      const TilePlace place = keys.place(tile);
      const uint64_t rows = keys.rows(place, batch);
      for (int row = 0; row < kTileRows; ++row) {
        if ((rows >> row & 1) == 0) continue;
        const bool sampled = place.region == Region::Video && row % 16 == 0;
        count += sampled;
        for (int c = 0; c < D; ++c) {
          const size_t i = at(batch, keys.token(place, row), head) + c;
          const float key = value(k, i), magnitude = std::abs(value(v, i));
          if (sampled && std::isfinite(key)) sum[c] += key;
          if (std::isfinite(magnitude)) most[c] = std::max(most[c], magnitude);
        }
      }
    }
    const float* channel = &channels[(batch * kHeads + head) * 2 * D];
    for (int c = 0; c < D; ++c) {
      if (!(std::abs(channel[c] - sum[c] / count) < 1e-5)) return "means";
      if (channel[D + c] != most[c] / kMostE4m3) return "scales of values";
    }
    for (int tile = 0; tile < tiles; ++tile)
      if (const char* what = wrong_tile<Key>(batch, head, tile, channel, most)) return what;
    return nullptr;
  }

  template <class Key>
  const char* wrong_tile(int batch, int head, int tile, const float* mean, const float* most)
      const {
    const TilePlace place = keys.place(tile);
    const uint64_t rows = keys.rows(place, batch);
    const unsigned char* image =
        &images[((size_t(batch) * kHeads + head) * tiles + tile) * Image::kImageBytes];
    const unsigned char* values = image + sizeof(Image::k);
    float largest = 0, scale;
    bool finite = true;
    const auto key = [&](int row, int c) {
      return value(k, at(batch, keys.token(place, row), head) + c) - mean[c];
    };
    int first = kTileRows;
    for (int row = kTileRows - 1; row >= 0; --row) {
      if ((rows >> row & 1) == 0) continue;
      first = row;
      for (int c = 0; c < D; ++c) {
        finite &= bool(std::isfinite(key(row, c)));
        largest = std::max(largest, std::abs(key(row, c)));
      }
    }
    std::memcpy(&scale, values + sizeof(Image::v), sizeof scale);
    const float top = std::is_same_v<Key, S8> ? kMostS8 : 16.f;
    if (first < kTileRows && !(finite ? scale == largest / top : std::isnan(scale)))
      return "scales of keys";
    for (int row = 0; row < kTileRows; ++row) {
      const bool there = rows >> row & 1;
      for (int c = 0; c < D; ++c) {
        if (finite && first < kTileRows) {
          const float x = key(there ? row : first, c) * (top / largest);
          if (image[decltype(Image::k)::place(row, c)] != host::narrow(Key{}, x)) return "keys";
        }
        const float v_of = there ? value(v, at(batch, keys.token(place, row), head) + c) : 0;
        const uint8_t code =
            std::isfinite(v_of) ? host::narrow(E4m3{}, v_of * (kMostE4m3 / most[c])) : 0x7f;
        if (values[decltype(Image::v)::place(c, key_place(row))] != code) return "values";
      }
      for (int sums = 0; sums < kSumRows; ++sums) {
        const uint8_t one = there && sums == 0 ? 0x38 : 0;
        if (values[decltype(Image::v)::place(D + sums, key_place(row))] != one)
          return "rows of sums";
      }
    }
    return nullptr;
  }
};

template <class First, class Second, class Key, class Params>
void check(unsigned seed) {
  Problem problem(seed);
  const auto params = problem.params<Params>();
  for (int64_t warp = 0; warp < First::warps(params); ++warp) First::run(params, warp);
  for (int64_t warp = 0; warp < Second::warps(params); ++warp) Second::run(params, warp);
  for (int batch = 0; batch < kBatch; ++batch) {
    for (int head = 0; head < kHeads; ++head) {
      const char* what = problem.wrong<Key>(batch, head);
      require(what == nullptr, std::string("WRONG NUMBERS in ") + (what ? what : ""));
    }
  }
}

#ifndef VSA_EACH_MUTANT
#define VSA_EACH_MUTANT(TILES) TILES(vsa)
#endif

std::string answer(const std::string& space, const std::string& problem, unsigned seeds) {
#define VSA_TILES(name)                                                          \
  if (space == #name && problem == "tiles")                                      \
    return first_of(seeds, [](unsigned seed) {                                   \
      using First = name::ChannelStatistics<Element, D>;                         \
      using Params = name::QuantiseTilesParams;                                  \
      if (seed % 2)                                                              \
        check<First, name::QuantiseTiles<Element, D, S8>, S8, Params>(seed);     \
      else                                                                       \
        check<First, name::QuantiseTiles<Element, D, E4m3>, E4m3, Params>(seed); \
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
