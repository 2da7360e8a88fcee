// SPDX-License-Identifier: Apache-2.0
// Runs the forward of int8 and fp8 on the emulator, on a small problem per schedule seed, and holds
// output and log-sum-exp against fp64 of the same eight bits.
//
//   low_precision_forward NAMESPACE forward|fp8|uneven|gated|long SEEDS [MUTANT]
//                "seed N: " and the first report within so many seeds, or "nothing"
//
// By turns in a ring of many stages and in one of few, with the total added to often. Uneven: some
// consumers want nearly all tiles, others few, far apart. Gated: the output is twice the fine
// stage's. Long: equal weights of so many keys that sums would be cut short. The namespaces are
// vsa, or those of VSA_EACH_MUTANT, which the tests of tests/mutants write: one with a kernel that
// behaves as the mutant of a number, others with one mutant each.
#include <cstdio>
#include <cstring>

#include "fine_problem.h"
#include "launch/low_precision_params.h"

namespace vsa::test {
namespace {

constexpr double kAllowed = 0.03, kAllowedLse = 0.045;

template <class Key>
struct Problem {
  const bool long_, far_;
  const Grid grid, kv_grid;
  const int tokens = grid.num_tokens(), keys = kv_grid.num_tokens();
  const int tiles = grid.num_tiles(), key_tiles = kv_grid.num_tiles();
  const float scale = 1 / std::sqrt(static_cast<float>(D));
  Tensor q{tokens, kHeads}, k{keys, kKvHeads}, v{keys, kKvHeads}, out{tokens, kHeads};
  Tensor fine{tokens, kHeads};
  const float gate = 2;
  std::vector<double> wanted;      // [tokens, heads, D]
  std::vector<float> lse;          // [heads, tokens]
  std::vector<double> wanted_lse;  // likewise
  std::vector<uint32_t> selected;  // [heads, tiles, words]
  int query_axes[kHeads] = {kAlongT, kAlongW};
  int tile_counter = 0;
  HeadRecord<D> record = {};
  std::vector<float> channels;  // [2, D]
  std::vector<Chunk> images;

  Problem(Selection selection, bool longest, unsigned seed)
      : long_(longest),
        far_(seed % 5 == 3),
        grid(longest                          ? make_grid({4, 4, 4}, {4, 4, 4})
             : selection == Selection::Random ? kFewTiles
                                              : kManyTiles),
        kv_grid(longest ? make_grid({4, 4, 160}, {4, 4, 4}) : grid),
        wanted(tokens * kHeads * D),
        lse(kHeads * tokens, NAN),
        wanted_lse(kHeads * tokens, -INFINITY),
        selected(kHeads * tiles * bitmap::words(key_tiles)),
        channels(2 * D),
        images(size_t(key_tiles) * QuantisedTile<D>::kImageBytes / sizeof(Chunk)) {
    std::mt19937 rng(seed);
    for (Tensor* x : {&q, &k, &v}) x->draw(rng);
    if (long_) {
      std::fill_n(q.data.begin(), tokens * kHeads * D, uint16_t{0});
      for (int i = 0; i < keys * D; ++i)
        v.data[i] = host::narrow(Element{}, host::widen(Element{}, v.data[i]) + 1);
      std::fill(selected.begin(), selected.end(), ~0u);
      for (int head = 0; head < kHeads; ++head)
        selected[head * 2 + 1] = (1u << (key_tiles - kWordBits)) - 1;
    } else {
      // Tiles of different sizes, so that each needs its own scale; and what is subtracted.
      for (int i = 0; i < keys * D; ++i) {
        const float size = 0.5f + static_cast<float>(kv_grid.tile_of(i / D) % 3);
        const float x = host::widen(Element{}, k.data[i]) * size + static_cast<float>(i % 5);
        k.data[i] = host::narrow(Element{}, x);
      }
      if (selection == Selection::Random)
        select(selected, tiles, seed, rng);
      else
        select_unevenly(selected, tiles, false, rng);
    }
    // Scores of which one step is many powers of two.
    const float factor = std::is_same_v<Key, S8> ? 0x1p24f : 0x1p10f;
    for (int i = 0; far_ && i < tokens * kHeads * D; ++i)
      q.data[i] = host::narrow(Element{}, host::widen(Element{}, q.data[i]) * factor);
    quantise();
    attend();
  }

  void quantise() {
    QuantiseTilesParams p{};
    p.k = {k.data.data(), int64_t{keys} * D, D, D};
    p.v = {v.data.data(), int64_t{keys} * D, D, D};
    p.keys = launch::tiled(kv_grid, nullptr);
    p.batch = p.heads = 1;
    p.records = &record;
    p.together = 1;
    p.channels = channels.data();
    p.images = reinterpret_cast<unsigned char*>(images.data());
    using First = ChannelStatistics<Element, D>;
    using Second = vsa::QuantiseTiles<Element, D, Key>;
    for (int64_t warp = 0; warp < First::warps(p); ++warp) First::run(p, warp);
    for (int64_t warp = 0; warp < Second::warps(p); ++warp) Second::run(p, warp);
  }

  // Token by token, of the numbers that eight bits stand for.
  void attend() {
    std::vector<double> wide_k(keys * D), wide_v(keys * D);
    for (int tile = 0; tile < key_tiles; ++tile) {
      const auto* image = reinterpret_cast<const unsigned char*>(images.data()) +
                          size_t(tile) * QuantisedTile<D>::kImageBytes;
      const unsigned char* values = image + sizeof(QuantisedTile<D>::k);
      float k_scale;
      std::memcpy(&k_scale, values + sizeof(QuantisedTile<D>::v), sizeof k_scale);
      for (int row = 0; row < kTileRows; ++row) {
        const int token = kv_grid.token(kv_grid.place(tile), row);
        for (int c = 0; c < D && token >= 0; ++c) {
          const double key =
              host::widen(Key{}, image[decltype(QuantisedTile<D>::k)::place(row, c)]);
          const float value =
              host::widen(E4m3{}, values[decltype(QuantisedTile<D>::v)::place(c, key_place(row))]);
          wide_k[token * D + c] = key * k_scale;
          wide_v[token * D + c] = double(value) * channels[D + c];
        }
      }
    }
    const std::vector<double> given = q.wide();
    for (int head = 0; head < kHeads; ++head) {
      for (int i = 0; i < tokens; ++i) {
        const int at = (i * kHeads + head) * D;
        double rounded[D], most = 0, of_mean = 0, own = 0, kept = 0;
        for (int c = 0; c < D; ++c) most = std::max(most, std::abs(given[at + c]));
        constexpr float kMost = kMostScored<Key>;
        const float units = kMost / static_cast<float>(most);
        for (int c = 0; c < D; ++c) {
          const float unrounded = static_cast<float>(given[at + c]) * units;
          const double code = host::widen(Key{}, host::narrow(Key{}, unrounded));
          rounded[c] = most > 0 ? code * most / kMost : 0;
          of_mean += given[at + c] * channels[c];
          own += given[at + c] * given[at + c];
          kept += given[at + c] * rounded[c];
        }
        for (int c = 0; c < D && std::is_same_v<Key, E4m3> && kept > 0; ++c)
          rounded[c] *= own / kept;
        const uint32_t* row =
            &selected[(head * tiles + grid.tile_of(i)) * bitmap::words(key_tiles)];
        std::vector<double> scores(keys, -INFINITY);
        double top = -INFINITY, sum = 0;
        for (int j = 0; j < keys; ++j) {
          if (!bitmap::test(row, kv_grid.tile_of(j))) continue;
          scores[j] = scale * dot(rounded, &wide_k[j * D]);
          top = std::max(top, scores[j]);
        }
        for (int j = 0; j < keys; ++j) {
          if (scores[j] == -INFINITY) continue;
          const double weight = std::exp(scores[j] - top);
          sum += weight;
          add_product(&wanted[at], weight, &wide_v[j * D]);
        }
        for (int c = 0; c < D && sum > 0; ++c) wanted[at + c] /= sum;
        if (sum > 0) wanted_lse[head * tokens + i] = top + std::log(sum) + scale * of_mean;
      }
    }
  }

  double error(const Tensor& result, double factor) const {
    const std::vector<double> got = result.wide();
    double off = 0, all = 0;
    for (size_t i = 0; i < wanted.size(); ++i) {
      off += (got[i] - factor * wanted[i]) * (got[i] - factor * wanted[i]);
      all += factor * wanted[i] * factor * wanted[i];
    }
    for (size_t i = wanted.size(); i < got.size(); ++i)
      if (result.data[i] != host::kNan16) return INFINITY;  // stored past the end
    return std::sqrt(off / all);
  }

  // What is wrong, if anything is.
  const char* wrong(bool gated) const {
    // Some of the largest scores are equal as halves.
    const bool equal = far_ && std::is_same_v<Key, E4m3>;
    const double allowed = long_ ? 0.01 : equal ? 0.4 : kAllowed;
    if (gated && !(error(fine, 1) <= allowed)) return "fine";
    if (!(error(out, gated ? gate : 1) <= allowed)) return "out";
    double largest = 0;
    for (const double x : wanted_lse)
      if (std::isfinite(x)) largest = std::max(largest, std::abs(x));
    const double of_scores = std::is_same_v<Key, S8> ? 1e-6 : 1e-3;  // as floats, as halves
    const double off = (long_ ? 0.002 : kAllowedLse) + of_scores * largest;
    for (size_t i = 0; i < lse.size(); ++i)
      if (!(lse[i] == wanted_lse[i] || std::abs(lse[i] - wanted_lse[i]) < off)) return "lse";
    return nullptr;
  }

  launch::LowPrecisionForward call(bool gated) {
    launch::LowPrecisionForward call{};
    static_cast<launch::FineForward&>(call) = call_for<launch::FineForward>(*this);
    call.kv_grid = kv_grid;
    call.out = out.sequence();
    if (gated) call.fine = fine.sequence(), call.gates.fine = {&gate, true, 0, 0, 0, 0};
    call.lse = lse.data();
    call.tile_counter = &tile_counter;
    call.fp8 = std::is_same_v<Key, E4m3>;
    call.images = images.data();
    call.channels = channels.data();
    return call;
  }
};

// So few stages that every load is waited for, a total from the second tile on, and queries where
// the output leaves from.
template <class Config>
struct Few8 : Config {
  static constexpr int kStages = 3, kChunkLoads = 4, kPeriod = 2;
  static constexpr bool kQueriesApart = false;
};

template <class Params>
void fill_params(Params& p, const launch::LowPrecisionForward& call) {
  p.images = static_cast<const unsigned char*>(call.images);
  p.channels = call.channels;
  using Base = std::conditional_t<std::is_base_of_v<GatedForwardParams, Params>, GatedForwardParams,
                                  FineForwardParams>;
  const std::string error =
      launch::make_params(static_cast<Base&>(p), static_cast<const launch::FineForward&>(call),
                          launch::encode_for_emulator);
  require(error.empty(), error);
}

// Throws what is wrong.
template <class Kernel, class FewKernel, bool kGated, bool kLongest>
void check(Selection selection, unsigned seed) {
  Problem<typename Kernel::Key> problem(selection, kLongest, seed);
  const launch::LowPrecisionForward call = problem.call(kGated);
  typename Kernel::Params params;
  fill_params(params, call);
  if constexpr (kLongest)  // the period of sums is what this problem is about
    run<Kernel>(params, seed);
  else
    seed % 2 == 0 ? run<Kernel>(params, seed) : run<FewKernel>(params, seed);
  const char* wrong = problem.wrong(kGated);
  require(wrong == nullptr, std::string("WRONG NUMBERS in ") + (wrong ? wrong : ""));
}

#ifndef VSA_EACH_MUTANT
#define VSA_EACH_MUTANT(FORWARD, FP8, UNEVEN, GATED, LONG) \
  FORWARD(vsa) FP8(vsa) UNEVEN(vsa) GATED(vsa) LONG(vsa)
#endif

std::string answer(const std::string& space, const std::string& lists, unsigned seeds) {
#define VSA_LISTS(name, called, Key, Output, selection, longest)             \
  if (space == #name && lists == called)                                     \
    return first_of(seeds, [](unsigned seed) {                               \
      using Config = name::LowPrecisionForwardConfig<Element, D, Key>;       \
      using Kernel = name::LowPrecisionForward<Config, Output>;              \
      using FewKernel = name::LowPrecisionForward<Few8<Config>, Output>;     \
      constexpr bool kGated = std::is_same_v<Output, GatedOutput>;           \
      check<Kernel, FewKernel, kGated, longest>(Selection::selection, seed); \
    });
#define VSA_FORWARD(name) VSA_LISTS(name, "forward", S8, PlainOutput, Random, false)
#define VSA_FP8(name) VSA_LISTS(name, "fp8", E4m3, PlainOutput, Random, false)
#define VSA_UNEVEN(name) VSA_LISTS(name, "uneven", S8, PlainOutput, UnevenQueries, false)
#define VSA_GATED(name) VSA_LISTS(name, "gated", S8, GatedOutput, Random, false)
#define VSA_LONG(name) VSA_LISTS(name, "long", S8, PlainOutput, Random, true)
  VSA_EACH_MUTANT(VSA_FORWARD, VSA_FP8, VSA_UNEVEN, VSA_GATED, VSA_LONG)
  return "?";
}

}  // namespace
}  // namespace vsa::test

int main(int argc, char** argv) {
  if (argc == 5) vsa::test::mutant = std::stoi(argv[4]);
  std::puts(argc >= 4 ? vsa::test::answer(argv[1], argv[2], std::stoul(argv[3])).c_str() : "?");
}
