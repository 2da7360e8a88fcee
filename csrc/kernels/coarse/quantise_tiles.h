// SPDX-License-Identifier: Apache-2.0
// Keys and values in eight bits, tile by tile, straight from the raster layout:
//
//   k = round((K - mean) / scale)   scale: the tile's largest magnitude becomes 127, or 16 as e4m3
//   v = e4m3(V / scale)             scale: the channel's largest magnitude of the head becomes 448
//
// into images that a copy brings as they are (tile/quantised_tile.h). What spans tiles comes from a
// pass before: the largest magnitude of each channel of V, and for each channel of K a number near
// its mean, the mean of every sixteenth row of the video's tiles. Softmax does not change when the
// same vector is subtracted from all keys, so that any vector would be right; one near the mean
// keeps scales small. Both are found by atomics whose order does not matter: the largest of
// integers, and sums of integers.
//
// Infinity and NaN: those of K make their tile's scale NaN, those of V become NaN themselves. They
// count for neither mean nor magnitude.
//
// One warp for a tile of a head. A lane owns eight neighbouring channels at a time, 16 bytes of a
// token. Bound by memory.
#pragma once
#include "kernels/schedule/sequence.h"
#include "prim/warp.h"
#include "tile/quantised_tile.h"

namespace vsa {

// Tokens of K or V; channels are contiguous, and every eight of them are 16 aligned bytes.
struct TokensToQuantise {
  const void* data;                                 // [batch, tokens, heads, head_dim]
  int64_t batch_stride, token_stride, head_stride;  // elements

  VSA_DEVICE int64_t offset(int batch, int token, int head) const {
    return batch * batch_stride + token * token_stride + head * head_stride;
  }
};

// What the first pass finds of a channel.
struct ChannelRecord {
  int64_t key_sum;  // of sampled tokens, in units of kMeanUnit
  int key_count;    // sampled tokens; in the first channel alone, for all of the head
  int value_most;   // bits of the largest magnitude
};

struct QuantiseTilesParams {
  TokensToQuantise k, v;
  TiledSequence keys;
  int batch, heads;
  ChannelRecord* records;  // [batch, heads, head_dim], zeros before the first pass
  float* channels;         // [batch, heads, 2, head_dim]: means of K, scales of V
  unsigned char* images;   // [batch, heads, tiles, QuantisedTile<head_dim>::kImageBytes]
};

// Of numbers that enter the mean. Larger ones count as zeros, so that sums fit 63 bits.
constexpr float kMostInMean = 32768;
constexpr float kMeanUnit = 1.f / 16777216;  // 2^-24
// The rows of a tile that are sampled.
constexpr uint64_t kSampledRows = 0x0001000100010001;
constexpr int kInfinityBits = 0x7f800000, kNanBits = 0x7fc00000;

// What both passes share: which lane reads which channels of which rows.
template <class Element, int D>
struct QuantisedLanes {
  static constexpr int kChannels = 8;                  // of a lane at a time
  static constexpr int kLanes = D / kChannels;         // of a row
  static constexpr int kRows = kWarpThreads / kLanes;  // at a time
  static constexpr int kTogether = 4;                  // loads in flight
  using Numbers = Floats<kChannels>;

  VSA_DEVICE static int channel(int lane) { return lane % kLanes * kChannels; }
  VSA_DEVICE static int row(int lane) { return lane / kLanes; }

  // The row's own numbers from `channel` on, or zeros where the row is no token.
  VSA_DEVICE static Numbers load(const TokensToQuantise& x,
                                 const TiledSequence& keys,
                                 const TilePlace& at,
                                 int batch,
                                 int head,
                                 int row,
                                 bool there,
                                 int channel) {
    const int token = keys.token(at, there ? row : 0);
    return load_floats<Element, kChannels>(x.data, x.offset(batch, token, head) + channel, there);
  }
};

// Of a float's bits: those of its magnitude, or 0 if it is infinite or NaN.
VSA_DEVICE int finite_magnitude(float x) {
  const int bits = float_bits(x) & 0x7fffffff;
  return bits < kInfinityBits ? bits : 0;
}

// The first pass. One warp for a few tiles of a head, so that atomics are few.
template <class Element, int D>
class ChannelStatistics {
 public:
  static constexpr int kTiles = 4;

  VSA_DEVICE static int groups(const TiledSequence& keys) {
    return ceil_div(keys.num_tiles(), kTiles);
  }
  // The warp's number counts heads, groups of tiles and batch elements, fastest first.
  VSA_DEVICE static int64_t warps(const QuantiseTilesParams& p) {
    return int64_t{p.batch} * groups(p.keys) * p.heads;
  }
  VSA_DEVICE static void run(const QuantiseTilesParams& p, int64_t warp) {
    const int head = static_cast<int>(warp % p.heads);
    const int group = static_cast<int>(warp / p.heads % groups(p.keys));
    const int batch = static_cast<int>(warp / p.heads / groups(p.keys));
    PerLane<Largest> most;
    PerLane<Sums> sums;
    each_lane([&](int lane) {
      most[lane] = {};
      sums[lane] = {};
    });
    int count = 0;
    for (int i = 0; i < kTiles; ++i) {
      const int tile = group * kTiles + i;
      if (tile >= p.keys.num_tiles()) break;
      const TilePlace at = p.keys.place(tile);
      const uint64_t rows = p.keys.rows(at, batch);
      each_lane([&](int lane) { add_values(most[lane], p, at, batch, head, rows, lane); });
      if (at.region != Region::Video) continue;
      count += popcount(rows & kSampledRows);
      each_lane([&](int lane) { add_keys(sums[lane], p, at, batch, head, rows, lane); });
    }
    const int64_t of_head = int64_t{batch} * p.heads + head;
    each_lane([&](int lane) {
      ChannelRecord* records = p.records + of_head * D;
      if (lane == 0) atomic_add(&records->key_count, count);
      records += Lanes::channel(lane);
      VSA_UNROLL
      for (int c = 0; c < Lanes::kChannels; ++c) {
        atomic_max(&records[c].value_most, most[lane].bits[c]);
        atomic_add(&records[c].key_sum, sums[lane].units[c]);
      }
    });
  }

 private:
  using Lanes = QuantisedLanes<Element, D>;
  struct Largest {
    int bits[Lanes::kChannels];
  };
  struct Sums {
    int64_t units[Lanes::kChannels];
  };

  VSA_DEVICE static void add_values(Largest& most,
                                    const QuantiseTilesParams& p,
                                    const TilePlace& at,
                                    int batch,
                                    int head,
                                    uint64_t rows,
                                    int lane) {
    for (int first = 0; first < kTileRows; first += Lanes::kRows * Lanes::kTogether) {
      typename Lanes::Numbers x[Lanes::kTogether];
      VSA_UNROLL
      for (int i = 0; i < Lanes::kTogether; ++i) {
        const int row = first + i * Lanes::kRows + Lanes::row(lane);
        x[i] =
            Lanes::load(p.v, p.keys, at, batch, head, row, rows >> row & 1, Lanes::channel(lane));
      }
      VSA_UNROLL
      for (int i = 0; i < Lanes::kTogether; ++i) {
        VSA_UNROLL
        for (int c = 0; c < Lanes::kChannels; ++c) {
          const int magnitude = finite_magnitude(x[i].x[c]);
          most.bits[c] = magnitude > most.bits[c] ? magnitude : most.bits[c];
        }
      }
    }
  }
  VSA_DEVICE static void add_keys(Sums& sums,
                                  const QuantiseTilesParams& p,
                                  const TilePlace& at,
                                  int batch,
                                  int head,
                                  uint64_t rows,
                                  int lane) {
    VSA_UNROLL
    for (int first = 0; first < kTileRows; first += 16 * Lanes::kRows) {
      const int row = first + 16 * Lanes::row(lane);
      const typename Lanes::Numbers x =
          Lanes::load(p.k, p.keys, at, batch, head, row, rows >> row & 1, Lanes::channel(lane));
      VSA_UNROLL
      for (int c = 0; c < Lanes::kChannels; ++c) {
        const bool kept = x.x[c] >= -kMostInMean && x.x[c] <= kMostInMean;  // not NaN
        sums.units[c] += nearest_integer(kept ? x.x[c] / kMeanUnit : 0);
      }
    }
  }
};

// The second pass. Key: S8 or E4m3
template <class Element, int D, class Key>
class QuantiseTiles {
 public:
  using Tile = QuantisedTile<D>;
  using Keys = decltype(Tile::k);
  using Values = decltype(Tile::v);

  // The warp's number counts heads, tiles and batch elements, fastest first.
  VSA_DEVICE static int64_t warps(const QuantiseTilesParams& p) {
    return int64_t{p.batch} * p.keys.num_tiles() * p.heads;
  }
  VSA_DEVICE static void run(const QuantiseTilesParams& p, int64_t warp) {
    const int head = static_cast<int>(warp % p.heads), tiles = p.keys.num_tiles();
    const int tile = static_cast<int>(warp / p.heads % tiles);
    const int batch = static_cast<int>(warp / p.heads / tiles);
    const int64_t of_head = int64_t{batch} * p.heads + head;
    const TilePlace at = p.keys.place(tile);
    const uint64_t rows = p.keys.rows(at, batch);
    unsigned char* image = p.images + (of_head * tiles + tile) * Tile::kImageBytes;
    write_keys(image, p, at, batch, head, rows, of_head);
    write_values(image + sizeof(Keys), p, at, batch, head, rows, of_head);
    if (tile == 0) write_channels(p, of_head);
  }

 private:
  using Lanes = QuantisedLanes<Element, D>;
  using Numbers = typename Lanes::Numbers;
  static constexpr float kMost = kMostScored<Key>;

  VSA_DEVICE static float mean(const QuantiseTilesParams& p, int64_t of_head, int channel) {
    const ChannelRecord* records = p.records + of_head * D;
    const float sum = static_cast<float>(records[channel].key_sum) * kMeanUnit;
    return sum / static_cast<float>(records->key_count);
  }
  VSA_DEVICE static float most_of_values(const QuantiseTilesParams& p,
                                         int64_t of_head,
                                         int channel) {
    return at_least(float_of(p.records[of_head * D + channel].value_most));
  }
  VSA_DEVICE static float at_least(float magnitude) { return max2(magnitude, kLeastMagnitude); }

  VSA_DEVICE static void write_channels(const QuantiseTilesParams& p, int64_t of_head) {
    each_lane([&](int lane) {
      for (int c = lane; c < D; c += kWarpThreads) {
        p.channels[of_head * 2 * D + c] = mean(p, of_head, c);
        p.channels[(of_head * 2 + 1) * D + c] = most_of_values(p, of_head, c) / kMostE4m3;
      }
    });
  }

  // Rows that are no token hold the first one that is; in a tile without any, zeros.
  VSA_DEVICE static Numbers load_key(const QuantiseTilesParams& p,
                                     const TilePlace& at,
                                     int batch,
                                     int head,
                                     uint64_t rows,
                                     int row,
                                     int channel) {
    const int first = popcount(~rows & (rows - 1));
    return Lanes::load(p.k, p.keys, at, batch, head, rows >> row & 1 ? row : first, rows != 0,
                       channel);
  }

  VSA_DEVICE static void write_keys(unsigned char* to,
                                    const QuantiseTilesParams& p,
                                    const TilePlace& at,
                                    int batch,
                                    int head,
                                    uint64_t rows,
                                    int64_t of_head) {
    // Twice over the tile: the second time it is near.
    PerLane<Numbers> means;
    PerLane<int> most;
    each_lane([&](int lane) {
      most[lane] = 0;
      VSA_UNROLL
      for (int c = 0; c < Lanes::kChannels; ++c)
        means[lane].x[c] = mean(p, of_head, Lanes::channel(lane) + c);
      for_each_key(p, at, batch, head, rows, lane, means[lane], [&](const Numbers& x, int) {
        VSA_UNROLL
        for (int c = 0; c < Lanes::kChannels; ++c) {
          const int bits = float_bits(x.x[c]) & 0x7fffffff;
          most[lane] = bits > most[lane] ? bits : most[lane];
        }
      });
    });
    const int bits = greatest([&](int lane) { return most[lane]; });
    const bool finite = bits < kInfinityBits;
    const float magnitude = at_least(finite ? float_of(bits) : 1);
    const float factor = finite ? kMost / magnitude : 0;
    each_lane([&](int lane) {
      for_each_key(p, at, batch, head, rows, lane, means[lane], [&](const Numbers& x, int row) {
        const auto pack = [&](int c) {
          return pack8<Key>(x.x[c] * factor, x.x[c + 1] * factor, x.x[c + 2] * factor,
                            x.x[c + 3] * factor);
        };
        auto* words = reinterpret_cast<uint32_t*>(to + Keys::place(row, Lanes::channel(lane)));
        words[0] = finite ? pack(0) : 0;
        words[1] = finite ? pack(4) : 0;
      });
      if (lane < kChunkBytes / 4) {
        auto* end = reinterpret_cast<float*>(to + Tile::kImageBytes - kChunkBytes);
        end[lane] = lane > 0 ? 0 : finite ? magnitude / kMost : float_of(kNanBits);
      }
    });
  }
  // fn(what is quantised, row) for the rows and channels of a lane
  template <class Fn>
  VSA_DEVICE static void for_each_key(const QuantiseTilesParams& p,
                                      const TilePlace& at,
                                      int batch,
                                      int head,
                                      uint64_t rows,
                                      int lane,
                                      const Numbers& means,
                                      Fn fn) {
    for (int first = 0; first < kTileRows; first += Lanes::kRows * Lanes::kTogether) {
      Numbers x[Lanes::kTogether];
      VSA_UNROLL
      for (int i = 0; i < Lanes::kTogether; ++i)
        x[i] = load_key(p, at, batch, head, rows, first + i * Lanes::kRows + Lanes::row(lane),
                        Lanes::channel(lane));
      VSA_UNROLL
      for (int i = 0; i < Lanes::kTogether; ++i) {
        VSA_UNROLL
        for (int c = 0; c < Lanes::kChannels; ++c)
          x[i].x[c] = rows != 0 ? x[i].x[c] - means.x[c] : 0;
        fn(x[i], first + i * Lanes::kRows + Lanes::row(lane));
      }
    }
  }

  // A lane takes four keys that follow each other in the order of key_place, which become one word
  // of each of its channels.
  VSA_DEVICE static void write_values(unsigned char* to,
                                      const QuantiseTilesParams& p,
                                      const TilePlace& at,
                                      int batch,
                                      int head,
                                      uint64_t rows,
                                      int64_t of_head) {
    constexpr int kFours = kTileRows / 4;
    each_lane([&](int lane) {
      const int place = lane % kFours * 4;
      for (int channel = lane / kFours * Lanes::kChannels; channel < D;
           channel += kWarpThreads / kFours * Lanes::kChannels) {
        Numbers x[4];
        VSA_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int row = key_at(place + i);
          x[i] = Lanes::load(p.v, p.keys, at, batch, head, row, rows >> row & 1, channel);
        }
        VSA_UNROLL
        for (int c = 0; c < Lanes::kChannels; ++c) {
          const float factor = kMostE4m3 / most_of_values(p, of_head, channel + c);
          const auto scaled = [&](int i) {
            const bool finite = (float_bits(x[i].x[c]) & 0x7fffffff) < kInfinityBits;
            return finite ? x[i].x[c] * factor : float_of(kNanBits);
          };
          store_word(to, channel + c, place,
                     pack8<E4m3>(scaled(0), scaled(1), scaled(2), scaled(3)));
        }
      }
      for (int row = lane / kFours; row < kSumRows; row += kWarpThreads / kFours) {
        const auto one = [&](int i) { return rows >> key_at(place + i) & 1 ? 1.f : 0.f; };
        store_word(to, D + row, place, row == 0 ? pack8<E4m3>(one(0), one(1), one(2), one(3)) : 0);
      }
    });
  }
  VSA_DEVICE static void store_word(unsigned char* to, int row, int byte, uint32_t word) {
    *reinterpret_cast<uint32_t*>(to + Values::place(row, byte)) = word;
  }
};

}  // namespace vsa
