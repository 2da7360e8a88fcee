// SPDX-License-Identifier: Apache-2.0
// What eight bits of keys and values need to know of a whole head
// (kernels/coarse/quantise_tiles.h): the largest magnitude of each channel of V, and for each
// channel of K a number near its mean, the mean of every sixteenth row of the video's tiles.
// Softmax does not change when the same vector is subtracted from all keys, so that any vector
// would be right; one near the mean keeps scales small. Both are found by atomics whose order does
// not matter: the largest of integers, and sums of integers. Infinity and NaN count for neither.
//
// Sixteen bytes of a token, eight neighbouring channels, are a lane's at a time. Bound by memory,
// if instructions are few: lanes work out where two tokens lie each and tell the others, and what
// is largest is found of 16-bit numbers, two by two.
#pragma once
#include "kernels/schedule/sequence.h"
#include "prim/warp.h"
#include "tile/quantised_tile.h"

namespace vsa {

// Tokens of K or V; channels are contiguous, and every eight of them are 16 aligned bytes.
struct TokensToQuantise {
  const void* data;                   // [batch, tokens, heads, head_dim]
  int64_t batch_stride, head_stride;  // elements
  int token_stride;

  VSA_DEVICE const uint16_t* of_head(int batch, int head) const {
    return static_cast<const uint16_t*>(data) + batch * batch_stride + head * head_stride;
  }
};

// What the first pass finds of the channels of a head.
template <int D>
struct HeadRecord {
  int64_t key_sum[D];  // of sampled tokens, in units of kMeanUnit
  int value_most[D];   // bits of the largest magnitude
  int key_count;       // sampled tokens
  int unused[D - 1];   // 16 bytes for each channel
};

struct QuantiseTilesParams {
  TokensToQuantise k, v;
  TiledSequence keys;
  int batch, heads;
  int together;           // tiles that a warp of the first pass takes, one after the other
  void* records;          // [batch, heads] of HeadRecord<head_dim>, zeros before the first pass
  float* channels;        // [batch, heads, 2, head_dim]: means of K, scales of V
  unsigned char* images;  // [batch, heads, tiles, QuantisedTile<head_dim>::kImageBytes]
};

// Of numbers that enter the mean. Larger ones count as zeros, so that sums fit 63 bits.
constexpr float kMostInMean = 32768;
constexpr float kMeanUnit = 1.f / 16777216;  // 2^-24
// The rows of a tile that are sampled.
constexpr uint64_t kSampledRows = 0x0001000100010001;
constexpr int kInfinityBits = 0x7f800000, kNanBits = 0x7fc00000;

// One tile of one head, and which lane reads which channels of which rows.
template <class Element, int D>
class TileToQuantise {
 public:
  static constexpr int kChannels = 8;                  // of a lane at a time
  static constexpr int kLanes = D / kChannels;         // of a row
  static constexpr int kRows = kWarpThreads / kLanes;  // at a time

  VSA_DEVICE static int channel(int lane) { return lane % kLanes * kChannels; }
  VSA_DEVICE static int row(int lane) { return lane / kLanes; }

  const int batch, head, tile;
  const TilePlace at;
  const uint64_t rows;  // that are tokens

  VSA_DEVICE TileToQuantise(const TiledSequence& keys, int batch, int head, int tile)
      : batch(batch), head(head), tile(tile), at(keys.place(tile)), rows(keys.rows(at, batch)) {
    const int first = rows == 0 ? 0 : popcount(~rows & (rows - 1));
    each_lane([&](int lane) {
      const auto token = [&](int row) { return keys.token(at, rows >> row & 1 ? row : first); };
      tokens_[0][lane] = token(lane);
      tokens_[1][lane] = token(lane + kWarpThreads);
    });
  }

  VSA_DEVICE bool is_token(int row) const { return rows >> row & 1; }
  // Where a row's token lies; of rows that are none the first one that is. For all lanes together,
  // inside each_lane. half: row / 32, if it is the same for all and known to the compiler.
  VSA_DEVICE int token(int row, int half) { return broadcast(tokens_[half], row % kWarpThreads); }
  VSA_DEVICE int token(int row) {
    const int first = token(row, 0), second = token(row, 1);
    return row < kWarpThreads ? first : second;
  }
  VSA_DEVICE static Chunk load(const TokensToQuantise& x, const uint16_t* data, int token) {
    return load_global(
        reinterpret_cast<const Chunk*>(data + int64_t{token} * int64_t{x.token_stride}));
  }
  // Number c of eight.
  VSA_DEVICE static float number(const Chunk& chunk, int c) {
    const uint32_t pair = chunk.pairs[c / 2];
    return c % 2 == 0 ? widen_low<Element>(pair) : widen_high<Element>(pair);
  }

  // fn(numbers, row) for the rows of a lane; as many loads in flight as Together says. data: of the
  // head, from the lane's channels on
  template <int Together, class Fn>
  VSA_DEVICE void for_each_load(const TokensToQuantise& x, const uint16_t* data, int lane, Fn fn) {
    VSA_UNROLL
    for (int half = 0; half < 2; ++half) {
      for (int first = 0; first < kWarpThreads; first += kRows * Together) {
        const int begin = half * kWarpThreads + first + row(lane);
        Chunk loaded[Together];
        VSA_UNROLL
        for (int i = 0; i < Together; ++i)
          loaded[i] = load(x, data, token(begin + i * kRows, half));
        VSA_UNROLL
        for (int i = 0; i < Together; ++i) fn(loaded[i], begin + i * kRows);
      }
    }
  }
  // Zeros in rows that are no token.
  VSA_DEVICE Chunk load_tokens(const TokensToQuantise& x,
                               const uint16_t* data,
                               int token,
                               int row) const {
    Chunk loaded = load(x, data, token);
    VSA_UNROLL
    for (uint32_t& pair : loaded.pairs) pair = is_token(row) ? pair : 0;
    return loaded;
  }

 private:
  PerLane<int> tokens_[2];
};

// Of a float's bits: those of its magnitude, or 0 if it is infinite or NaN.
VSA_DEVICE int finite_magnitude(float x) {
  const int bits = float_bits(x) & 0x7fffffff;
  return bits < kInfinityBits ? bits : 0;
}

// A number for each channel of a head, some in each lane.
template <int D>
class PerChannel {
 public:
  // fn(channel)
  template <class Fn>
  VSA_DEVICE explicit PerChannel(Fn fn) {
    each_lane([&](int lane) {
      VSA_UNROLL
      for (int i = 0; i < kEach; ++i) x_[i][lane] = fn(lane * kEach + i);
    });
  }
  // Of channel first + c, for all lanes together, inside each_lane. first: a multiple of kEach
  VSA_DEVICE float of(int first, int c) { return broadcast(x_[c % kEach], (first + c) / kEach); }

 private:
  static constexpr int kEach = D / kWarpThreads;
  PerLane<float> x_[kEach];
};

// The first pass. One warp for a few tiles of a head, so that atomics are few.
template <class Element, int D>
class ChannelStatistics {
 public:
  VSA_HD static int groups(const QuantiseTilesParams& p) {
    return ceil_div(p.keys.num_tiles(), p.together);
  }
  // The warp's number counts heads, groups of tiles and batch elements, fastest first.
  VSA_HD static int64_t warps(const QuantiseTilesParams& p) {
    return int64_t{p.batch} * groups(p) * p.heads;
  }
  VSA_DEVICE static void run(const QuantiseTilesParams& p, int64_t warp) {
    const int head = static_cast<int>(warp % p.heads);
    const int group = static_cast<int>(warp / p.heads % groups(p));
    const int batch = static_cast<int>(warp / p.heads / groups(p));
    auto& record = static_cast<HeadRecord<D>*>(p.records)[int64_t{batch} * p.heads + head];
    // One after the other, which takes fewer registers.
    const auto for_each_tile = [&](auto fn) {
      for (int i = 0; i < p.together; ++i) {
        const int at = group * p.together + i;
        if (at >= p.keys.num_tiles()) break;
        Tile tile(p.keys, batch, head, at);
        if (tile.rows != 0) fn(tile);
      }
    };
    PerLane<Largest> most;
    each_lane([&](int lane) { most[lane] = {}; });
    for_each_tile([&](Tile& tile) { add_values(most, p, tile); });
    fold_rows(most);
    PerLane<Sums> sums;
    each_lane([&](int lane) {
      VSA_UNROLL
      for (int c = 0; c < Tile::kChannels; ++c)
        if (Tile::row(lane) == 0)
          atomic_max(&record.value_most[Tile::channel(lane) + c], most[lane].bits[c]);
      sums[lane] = {};
    });
    int count = 0;
    for_each_tile([&](Tile& tile) {
      if (tile.at.region != Region::Video) return;
      count += popcount(tile.rows & kSampledRows);
      add_keys(sums, p, tile);
    });
    fold_sums(sums);
    each_lane([&](int lane) {
      if (lane == 0) atomic_add(&record.key_count, count);
      VSA_UNROLL
      for (int c = 0; c < Tile::kChannels; ++c)
        if (Tile::row(lane) == 0)
          atomic_add(&record.key_sum[Tile::channel(lane) + c], sums[lane].units[c]);
    });
  }

 private:
  using Tile = TileToQuantise<Element, D>;
  struct Largest {
    int bits[Tile::kChannels];
  };
  struct Sums {
    int64_t units[Tile::kChannels];
  };

  VSA_DEVICE static void add_values(PerLane<Largest>& most,
                                    const QuantiseTilesParams& p,
                                    Tile& tile) {
    PerLane<Largest> here;
    each_lane([&](int lane) {
      const uint16_t* values = p.v.of_head(tile.batch, tile.head) + Tile::channel(lane);
      Chunk all = {};
      // Rows that are no token hold another one.
      tile.template for_each_load<8>(p.v, values, lane, [&](const Chunk& x, int) {
        VSA_UNROLL
        for (int j = 0; j < 4; ++j)
          all.pairs[j] = max_pairs<Element>(all.pairs[j], x.pairs[j] & 0x7fff7fff);
      });
      VSA_UNROLL
      for (int c = 0; c < Tile::kChannels; ++c)
        here[lane].bits[c] = float_bits(Tile::number(all, c));
    });
    const int greatest_bits = greatest([&](int lane) {
      int bits = 0;
      VSA_UNROLL
      for (int c = 0; c < Tile::kChannels; ++c) bits = larger(bits, here[lane].bits[c]);
      return bits;
    });
    if (greatest_bits >= kInfinityBits) find_finite(here, p, tile);
    each_lane([&](int lane) {
      VSA_UNROLL
      for (int c = 0; c < Tile::kChannels; ++c)
        most[lane].bits[c] = larger(most[lane].bits[c], here[lane].bits[c]);
    });
  }
  // Of a tile with infinity or NaN.
  VSA_DEVICE static void find_finite(PerLane<Largest>& most,
                                     const QuantiseTilesParams& p,
                                     Tile& tile) {
    each_lane([&](int lane) {
      const uint16_t* values = p.v.of_head(tile.batch, tile.head) + Tile::channel(lane);
      most[lane] = {};
      tile.template for_each_load<1>(p.v, values, lane, [&](const Chunk& x, int) {
        VSA_UNROLL
        for (int c = 0; c < Tile::kChannels; ++c)
          most[lane].bits[c] = larger(most[lane].bits[c], finite_magnitude(Tile::number(x, c)));
      });
    });
  }
  VSA_DEVICE static int larger(int a, int b) { return a > b ? a : b; }
  // Lanes that hold other rows of the same channels.
  VSA_DEVICE static void fold_rows(PerLane<Largest>& most) {
    VSA_UNROLL
    for (int apart = Tile::kLanes; apart < kWarpThreads; apart *= 2) {
      VSA_UNROLL
      for (int c = 0; c < Tile::kChannels; ++c) {
        PerLane<int> bits;
        each_lane([&](int lane) { bits[lane] = most[lane].bits[c]; });
        each_lane([&](int lane) {
          most[lane].bits[c] = larger(bits[lane], broadcast(bits, lane ^ apart));
        });
      }
    }
  }
  VSA_DEVICE static void fold_sums(PerLane<Sums>& sums) {
    VSA_UNROLL
    for (int apart = Tile::kLanes; apart < kWarpThreads; apart *= 2) {
      VSA_UNROLL
      for (int c = 0; c < Tile::kChannels; ++c) {
        PerLane<int64_t> units;
        each_lane([&](int lane) { units[lane] = sums[lane].units[c]; });
        each_lane(
            [&](int lane) { sums[lane].units[c] = units[lane] + broadcast(units, lane ^ apart); });
      }
    }
  }
  VSA_DEVICE static void add_keys(PerLane<Sums>& sums, const QuantiseTilesParams& p, Tile& tile) {
    each_lane([&](int lane) {
      const uint16_t* keys = p.k.of_head(tile.batch, tile.head) + Tile::channel(lane);
      VSA_UNROLL
      for (int first = 0; first < kTileRows; first += 16 * Tile::kRows) {
        const int row = first + 16 * Tile::row(lane);
        const Chunk x = tile.load_tokens(p.k, keys, tile.token(row), row);
        VSA_UNROLL
        for (int c = 0; c < Tile::kChannels; ++c) {
          const float key = Tile::number(x, c);
          const bool kept = key >= -kMostInMean && key <= kMostInMean;  // not NaN
          sums[lane].units[c] += nearest_integer(kept ? key / kMeanUnit : 0);
        }
      }
    });
  }
};

}  // namespace vsa
