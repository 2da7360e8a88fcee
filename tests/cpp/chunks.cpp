// SPDX-License-Identifier: Apache-2.0
// Kernels of a video that comes chunk by chunk against plain loops: what a chunk leaves in a cache,
// its means, bitmaps with their chunks in another order, and which of equal scores go first.
//
//   chunks NAMESPACE fill|reorder|ties SEEDS [MUTANT]    "seed N: " and the first report within so
//                                                        many, or "nothing"
//
// The namespaces are vsa, or those of VSA_EACH_MUTANT, which tests/mutants/test_chunks.py writes.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kernels/coarse/chunk_means.h"
#include "kernels/select/reorder_bitmap.h"
#include "kernels/select/select_tiles.h"
#include "prim/host_block.h"
#include "reports.h"

namespace vsa::test {
namespace {

struct Random {
  std::mt19937 rng;
  int below(int end) { return static_cast<int>(rng() % static_cast<unsigned>(end)); }
  bool coin() { return below(2) == 0; }
};

constexpr uint16_t kAround = 0xabcd;
constexpr float kNoMean = 1e30f;

// Tokens [batch, length, heads, head_dim] of fp16, with room between them.
struct Tokens {
  int64_t batch_stride, token_stride, head_stride, room;
  std::vector<uint16_t> memory;

  Tokens(Random& random, int batch, int length, int heads, int head_dim) {
    const bool inside = random.coin();
    const int64_t wide = head_dim + 8 * random.below(2);
    head_stride = inside ? wide : wide * (length + 1);
    token_stride = inside ? wide * (heads + 1) : wide;
    batch_stride = wide * (length + 1) * (heads + 1);
    room = 600 * token_stride;  // on both sides, that a wrong kernel may write to
    memory.assign(static_cast<size_t>(batch_stride * batch + 2 * room), kAround);
  }
  uint16_t* data() { return memory.data() + room; }
  size_t place(int batch, int token, int head, int channel) const {
    return static_cast<size_t>(room + batch * batch_stride + token * token_stride +
                               head * head_stride + channel);
  }
};

// A chunk, and a cache of several slots.
struct Chunk {
  Random random;
  Grid grid;
  int batch, head_dim, slots, slot, cache_prefix;
  int heads[3];  // of keys, values and queries

  explicit Chunk(unsigned seed) : random{std::mt19937(seed)} {
    const auto side = [&](int most) { return 1 + random.below(most); };
    const bool text = random.coin();
    const Axes tile = {side(3), side(3), side(4)};
    grid = make_grid({tile.t * side(2), side(7), side(7)}, tile, text ? side(5) : 0, 0);
    cache_prefix = text ? grid.prefix : random.coin() ? side(5) : 0;
    batch = side(2);
    head_dim = 8 * side(2);
    slots = side(4);
    slot = random.below(slots);
    heads[0] = heads[1] = side(2);
    heads[2] = heads[0] * side(2);
  }
  int tokens() const { return grid.num_tokens() - grid.prefix; }
  int cache_length() const { return cache_prefix + slots * tokens(); }
};

template <class Space, int N>
void fill(unsigned seed) {
  Chunk chunk(seed);
  Random& random = chunk.random;
  const Grid& grid = chunk.grid;
  const bool by_number = random.coin();
  const int count = random.coin() ? 3 : 2;
  const int64_t slot = chunk.slot, tiles = grid.num_tiles();
  typename Space::Params p{};
  p.count = count;
  p.head_dim = chunk.head_dim;
  p.slot = by_number ? &slot : nullptr;
  for (int row = 0; row < kTileRows; ++row) {
    const Axes at = row_offset(grid.tile, row);
    p.row_tokens[row] = (at.t * grid.video.h + at.h) * grid.video.w + at.w;
  }
  std::vector<Tokens> given, caches, wanted;
  std::vector<std::vector<float>> means, truths;
  for (int i = 0; i < count; ++i) {
    const int heads = chunk.heads[i], slots = i < 2 ? chunk.slots : 1;
    given.emplace_back(random, chunk.batch, grid.num_tokens(), heads, chunk.head_dim);
    for (uint16_t& x : given[i].memory)
      x = static_cast<uint16_t>((random.coin() ? 0x8000 : 0) | (0x3000 + random.below(0x1800)));
    caches.emplace_back(random, chunk.batch, chunk.cache_length(), heads, chunk.head_dim);
    const size_t numbers = static_cast<size_t>(chunk.batch * heads * slots * tiles);
    const size_t room = static_cast<size_t>(chunk.slots * tiles);  // as above, at the end
    means.emplace_back((numbers + room) * chunk.head_dim, kNoMean);
  }
  wanted = caches;
  truths = means;
  for (int i = 0; i < count; ++i) {
    const int heads = chunk.heads[i];
    auto& x = p.tensors[i];
    x.data = given[i].data();
    x.batch_stride = given[i].batch_stride;
    x.token_stride = given[i].token_stride;
    x.head_stride = given[i].head_stride;
    x.grid = grid;
    for (int row = 0; row < grid.tile.volume(); ++row)
      x.row_offsets[row] = p.row_tokens[row] * x.token_stride;
    x.heads = heads;
    x.lanes = int64_t{chunk.batch} * tiles * heads * chunk.head_dim / N;
    auto& to = p.slots[i];
    const int first = i < 2 && !by_number ? chunk.slot : 0;
    x.means = means[i].data() + first * tiles * chunk.head_dim;
    to.means_stride = (i < 2 ? chunk.slots : 1) * tiles * chunk.head_dim;
    if (i == 2) continue;
    Tokens& cache = caches[i];
    const int begin = chunk.cache_prefix + first * chunk.tokens();
    to.text = grid.prefix > 0 ? cache.data() : nullptr;
    to.video = cache.data() + begin * cache.token_stride;
    to.batch_stride = cache.batch_stride;
    to.token_stride = cache.token_stride;
    to.head_stride = cache.head_stride;
    to.text_lanes = int64_t{chunk.batch} * grid.prefix * heads * chunk.head_dim / N;
  }
  for (int i = 0; i < count; ++i) {
    std::vector<int> sizes(static_cast<size_t>(tiles), 0);
    std::vector<double> sums(truths[i].size(), 0);
    const int slots = i < 2 ? chunk.slots : 1, at = i < 2 ? chunk.slot : 0;
    const auto number = [&](int b, int head, int tile, int c) {
      return static_cast<size_t>(
          (((int64_t{b} * chunk.heads[i] + head) * slots + at) * tiles + tile) * chunk.head_dim +
          c);
    };
    for (int token = 0; token < grid.num_tokens(); ++token) {
      const int tile = grid.tile_of(token);
      if (tile >= 0) ++sizes[static_cast<size_t>(tile)];
      const int to =
          tile < 0 ? token : chunk.cache_prefix + chunk.slot * chunk.tokens() + token - grid.prefix;
      for (int b = 0; b < chunk.batch; ++b)
        for (int head = 0; head < chunk.heads[i]; ++head)
          for (int c = 0; c < chunk.head_dim; ++c) {
            const uint16_t x = given[i].memory[given[i].place(b, token, head, c)];
            if (i < 2) wanted[i].memory[wanted[i].place(b, to, head, c)] = x;
            if (tile >= 0) sums[number(b, head, tile, c)] += host::widen(Fp16{}, x);
          }
    }
    for (int b = 0; b < chunk.batch; ++b)
      for (int head = 0; head < chunk.heads[i]; ++head)
        for (int tile = 0; tile < tiles; ++tile)
          for (int c = 0; c < chunk.head_dim; ++c)
            truths[i][number(b, head, tile, c)] = static_cast<float>(
                sums[number(b, head, tile, c)] / sizes[static_cast<size_t>(tile)]);
  }
  using Kernel = std::conditional_t<N == 1, typename Space::Single, typename Space::Vectors>;
  for (int i = 0; i < count; ++i) {
    for (int64_t lane = 0; lane < p.tensors[i].lanes; ++lane) Kernel::run(p, i, lane);
    for (int lane = 0; lane < p.slots[i].text_lanes; ++lane) Kernel::copy_text(p, i, lane);
  }
  for (int i = 0; i < count; ++i) {
    require(caches[i].memory == wanted[i].memory, "WRONG TOKENS");
    for (size_t j = 0; j < means[i].size(); ++j)
      require(std::abs(means[i][j] - truths[i][j]) <= 1e-5f, "WRONG MEANS");
  }
}

template <class Space>
std::string fills(unsigned seeds) {
  return first_of(seeds,
                  [](unsigned seed) { seed % 2 ? fill<Space, 1>(seed) : fill<Space, 8>(seed); });
}

bool bit(const std::vector<uint32_t>& bits, int row, int words, int column) {
  return (bits[static_cast<size_t>(row * words + column / 32)] >> column % 32 & 1) != 0;
}

template <class Space>
std::string reorders(unsigned seeds) {
  return first_of(seeds, [](unsigned seed) {
    Random random{std::mt19937(seed)};
    const int chunks = 1 + random.below(6), per_chunk = 1 + random.below(80);
    const int columns = chunks * per_chunk, words = bitmap::words(columns);
    const int rows = 1 + random.below(4);
    std::vector<int64_t> order(static_cast<size_t>(chunks));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random.rng);
    std::vector<uint32_t> source(static_cast<size_t>(rows * words)), target(source.size(), ~0u);
    for (uint32_t& word : source) word = random.rng();
    typename Space::Order p = {source.data(), target.data(), order.data(),
                               columns,       per_chunk,     int64_t{rows} * words};
    for (int64_t lane = 0; lane < p.lanes; ++lane) Space::Reorder::run(p, lane);
    for (int row = 0; row < rows; ++row)
      for (int column = 0; column < 32 * words; ++column) {
        const int from = static_cast<int>(order[std::min(column / per_chunk, chunks - 1)]);
        const bool is =
            column < columns && bit(source, row, words, from * per_chunk + column % per_chunk);
        require(bit(target, row, words, column) == is, "WRONG BITS");
      }
  });
}

// Rows of few scores, so that many are equal.
template <class Space>
void ties(unsigned seed) {
  Random random{std::mt19937(seed)};
  const int slots = 1 + random.below(5), per_slot = 1 + random.below(40);
  const int sinks = random.below(slots), columns = slots * per_slot;
  const int words = bitmap::words(columns), rows = 4;
  const int64_t oldest = sinks + random.below(slots - sinks);
  std::vector<float> scores(static_cast<size_t>(rows * columns));
  const int kinds = 1 + random.below(4), numbers = random.coin() ? 20 : 3;
  for (float& x : scores) {
    x = static_cast<float>(random.below(kinds));
    if (random.below(numbers) == 0) x = random.coin() ? NAN : -INFINITY;
  }
  std::vector<uint32_t> bitmap(static_cast<size_t>(rows * words), ~0u);
  typename Space::Select p{};
  p.scores = scores.data();
  p.bitmap = bitmap.data();
  p.rows = rows;
  p.columns = columns;
  p.query_tiles = rows;
  p.num_counts = 1;
  p.counts[0] = 1 + random.below(columns);
  p.mass = random.coin() ? 0 : (1 + random.below(100)) / 100.;
  p.order = {&oldest, sinks * per_slot, per_slot};
  const bool longer = random.coin();
  for (int row = 0; row < rows; ++row) {
    if (p.mass > 0)
      longer ? Space::LongMass::run(p, row) : Space::Mass::run(p, row);
    else
      longer ? Space::LongCount::run(p, row) : Space::Count::run(p, row);
  }
  // Columns in the order of time: the sinks', from the oldest on, and the others.
  std::vector<int> time;
  for (int i = 0; i < slots; ++i) {
    const int ring = slots - sinks, turn = static_cast<int>(oldest) - sinks;
    const int slot = i < sinks ? i : sinks + (turn + i - sinks) % ring;
    for (int j = 0; j < per_slot; ++j) time.push_back(slot * per_slot + j);
  }
  for (int row = 0; row < rows; ++row) {
    const auto score = [&](int j) {
      const float x = scores[static_cast<size_t>(row * columns + j)];
      return std::isnan(x) ? -INFINITY : x;
    };
    std::vector<int> best = time;
    std::stable_sort(best.begin(), best.end(), [&](int a, int b) { return score(a) > score(b); });
    std::vector<uint64_t> sums = {0};
    const float top = score(best[0]);
    for (int j : best)
      sums.push_back(sums.back() + vsa::softmax_weight(score(j) == top ? 0 : top - score(j)));
    const auto target = static_cast<uint64_t>(std::ceil(static_cast<double>(sums.back()) * p.mass));
    int count = p.counts[0];
    while (p.mass > 0 && sums[static_cast<size_t>(count)] < target) ++count;
    std::vector<uint32_t> bits(static_cast<size_t>(words), 0);
    for (int i = 0; i < count; ++i) bits[best[i] / 32] |= 1u << best[i] % 32;
    require(std::equal(bits.begin(), bits.end(), bitmap.data() + row * words), "WRONG CHOICE");
  }
}

#ifndef VSA_EACH_MUTANT
#define VSA_EACH_MUTANT(FILL, REORDER, TIES) FILL(vsa) REORDER(vsa) TIES(vsa)
#endif

// What a namespace calls its kernels.
#define VSA_SPACE(name)                                                   \
  struct Space {                                                          \
    using Vectors [[maybe_unused]] = name::ChunkMeans<Fp16, 8>;           \
    using Single [[maybe_unused]] = name::ChunkMeans<Fp16, 1>;            \
    using Params [[maybe_unused]] = name::ChunkMeansParams;               \
    using Reorder [[maybe_unused]] = name::ReorderBitmap;                 \
    using Order [[maybe_unused]] = name::ReorderBitmapParams;             \
    using Select [[maybe_unused]] = name::SelectTilesParams;              \
    using Count [[maybe_unused]] = name::SelectTiles<8, false, false>;    \
    using Mass [[maybe_unused]] = name::SelectTiles<8, false, true>;      \
    using LongCount [[maybe_unused]] = name::SelectTiles<2, true, false>; \
    using LongMass [[maybe_unused]] = name::SelectTiles<2, true, true>;   \
  };

template <class Space>
std::string all_ties(unsigned seeds) {
  return first_of(seeds, [](unsigned seed) { ties<Space>(seed); });
}

std::string answer(const std::string& space, const std::string& problem, unsigned seeds) {
#define VSA_FILL(name)                          \
  if (space == #name && problem == "fill") {    \
    VSA_SPACE(name) return fills<Space>(seeds); \
  }
#define VSA_REORDER(name)                          \
  if (space == #name && problem == "reorder") {    \
    VSA_SPACE(name) return reorders<Space>(seeds); \
  }
#define VSA_TIES(name)                             \
  if (space == #name && problem == "ties") {       \
    VSA_SPACE(name) return all_ties<Space>(seeds); \
  }
  VSA_EACH_MUTANT(VSA_FILL, VSA_REORDER, VSA_TIES)
  return "?";
}

}  // namespace
}  // namespace vsa::test

int main(int argc, char** argv) {
  if (argc == 5) vsa::test::mutant = std::stoi(argv[4]);
  std::puts(argc >= 4 ? vsa::test::answer(argv[1], argv[2], std::stoul(argv[3])).c_str() : "?");
}
