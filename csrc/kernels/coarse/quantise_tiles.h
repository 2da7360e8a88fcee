// SPDX-License-Identifier: Apache-2.0
// Keys and values in eight bits, tile by tile, straight from the raster layout:
//
//   k = round((K - mean) / scale)   scale: the tile's largest magnitude becomes 127, or 16 as e4m3
//   v = e4m3(V / scale)             scale: the channel's largest magnitude of the head becomes 448
//
// into images that a copy brings as they are (tile/quantised_tile.h). What spans tiles comes from a
// pass before, kernels/coarse/channel_statistics.h.
//
// Infinity and NaN: those of K make their tile's scale NaN, those of V become NaN themselves.
//
// One warp for a tile of a head. Bound by memory.
#pragma once
#include "kernels/coarse/channel_statistics.h"

namespace vsa {

// The second pass. Key: S8 or E4m3
template <class Element, int D, class Key>
class QuantiseTiles {
 public:
  using Image = QuantisedTile<D>;
  using Keys = decltype(Image::k);
  using Values = decltype(Image::v);

  // The warp's number counts heads, tiles and batch elements, fastest first.
  VSA_HD static int64_t warps(const QuantiseTilesParams& p) {
    return int64_t{p.batch} * p.keys.num_tiles() * p.heads;
  }
  VSA_DEVICE static void run(const QuantiseTilesParams& p, int64_t warp) {
    const int head = static_cast<int>(warp % p.heads), tiles = p.keys.num_tiles();
    const int number = static_cast<int>(warp / p.heads % tiles);
    const int batch = static_cast<int>(warp / p.heads / tiles);
    Tile tile(p.keys, batch, head, number);
    const int64_t of_head = int64_t{batch} * p.heads + head;
    const auto& record = static_cast<const HeadRecord<D>*>(p.records)[of_head];
    unsigned char* image = p.images + (of_head * tiles + number) * Image::kImageBytes;
    write_keys(image, p, tile, record);
    write_values(image + sizeof(Keys), p, tile, record);
    if (number == 0) write_channels(p.channels + of_head * 2 * D, record);
  }

 private:
  using Tile = TileToQuantise<Element, D>;
  using Record = HeadRecord<D>;
  using Numbers = Floats<Tile::kChannels>;
  static constexpr float kMost = kMostScored<Key>;

  VSA_DEVICE static float mean(const Record& record, int channel) {
    const float sum = static_cast<float>(record.key_sum[channel]) * kMeanUnit;
    return sum / static_cast<float>(record.key_count);
  }
  VSA_DEVICE static float most_of_values(const Record& record, int channel) {
    return at_least(float_of(record.value_most[channel]));
  }
  VSA_DEVICE static float at_least(float magnitude) { return max2(magnitude, kLeastMagnitude); }

  VSA_DEVICE static void write_channels(float* channels, const Record& record) {
    each_lane([&](int lane) {
      for (int c = lane; c < D; c += kWarpThreads) {
        channels[c] = mean(record, c);
        channels[D + c] = most_of_values(record, c) / kMostE4m3;
      }
    });
  }

  // Rows that are no token hold the first one that is; in a tile without any, zeros.
  VSA_DEVICE static void write_keys(unsigned char* to,
                                    const QuantiseTilesParams& p,
                                    Tile& tile,
                                    const Record& record) {
    // Twice over the tile: the second time it is near.
    PerLane<Numbers> means;
    PerLane<int> most;
    PerChannel<D> of_head([&](int channel) { return mean(record, channel); });
    each_lane([&](int lane) {
      VSA_UNROLL
      for (int c = 0; c < Tile::kChannels; ++c)
        means[lane].x[c] = of_head.of(Tile::channel(lane), c);
      most[lane] = largest(p, tile, means[lane], lane);
    });
    const bool any = tile.rows != 0;
    const int bits = any ? greatest([&](int lane) { return most[lane]; }) : 0;
    const bool finite = bits < kInfinityBits;
    const float magnitude = at_least(finite ? float_of(bits) : 1);
    const float factor = kMost / magnitude;
    each_lane([&](int lane) {
      const uint16_t* keys = p.k.of_head(tile.batch, tile.head) + Tile::channel(lane);
      tile.template for_each_load<4>(p.k, keys, lane, [&](const Chunk& x, int row) {
        const auto pack = [&](int first) -> uint64_t {
          const auto scaled = [&](int c) {
            return (Tile::number(x, first + c) - means[lane].x[first + c]) * factor;
          };
          return pack8<Key>(scaled(0), scaled(1), scaled(2), scaled(3));
        };
        auto* eight = reinterpret_cast<uint64_t*>(to + Keys::place(row, Tile::channel(lane)));
        *eight = finite && any ? pack(0) | pack(4) << 32 : 0;
      });
      if (lane < kChunkBytes / 4) {
        auto* end = reinterpret_cast<float*>(to + Image::kImageBytes - kChunkBytes);
        end[lane] = lane > 0 ? 0 : finite ? magnitude / kMost : float_of(kNanBits);
      }
    });
  }
  // Bits of the largest magnitude of a lane's keys without their mean; those of infinity or NaN if
  // there is any. Differences grow with the keys, so that each channel's ends suffice.
  VSA_DEVICE static int largest(const QuantiseTilesParams& p,
                                Tile& tile,
                                const Numbers& means,
                                int lane) {
    Chunk most = {}, least = {};
    bool begun = false;
    const uint16_t* keys = p.k.of_head(tile.batch, tile.head) + Tile::channel(lane);
    tile.template for_each_load<8>(p.k, keys, lane, [&](const Chunk& x, int) {
      VSA_UNROLL
      for (int j = 0; j < 4; ++j) {
        most.pairs[j] = begun ? max_pairs<Element>(most.pairs[j], x.pairs[j]) : x.pairs[j];
        least.pairs[j] = begun ? min_pairs<Element>(least.pairs[j], x.pairs[j]) : x.pairs[j];
      }
      begun = true;
    });
    int bits = 0;
    VSA_UNROLL
    for (int c = 0; c < Tile::kChannels; ++c) {
      const int above = float_bits(Tile::number(most, c) - means.x[c]) & 0x7fffffff;
      const int below = float_bits(Tile::number(least, c) - means.x[c]) & 0x7fffffff;
      bits = max3(bits, above, below);
    }
    return bits;
  }
  // A lane takes four keys that follow each other in the order of key_place, which become one word
  // of each of its channels.
  VSA_DEVICE static void write_values(unsigned char* to,
                                      const QuantiseTilesParams& p,
                                      Tile& tile,
                                      const Record& record) {
    constexpr int kFours = kTileRows / 4;
    PerChannel<D> factors([&](int channel) { return kMostE4m3 / most_of_values(record, channel); });
    each_lane([&](int lane) {
      const int place = lane % kFours * 4;
      const uint16_t* data = p.v.of_head(tile.batch, tile.head);
      int tokens[4];
      VSA_UNROLL
      for (int i = 0; i < 4; ++i) tokens[i] = tile.token(key_at(place + i));
      VSA_UNROLL
      for (int more = 0; more < D; more += kWarpThreads / kFours * Tile::kChannels) {
        const int channel = lane / kFours * Tile::kChannels + more;
        Chunk x[4];
        VSA_UNROLL
        for (int i = 0; i < 4; ++i)
          x[i] = tile.load_tokens(p.v, data + channel, tokens[i], key_at(place + i));
        VSA_UNROLL
        for (int c = 0; c < Tile::kChannels; ++c) {
          const float factor = factors.of(channel, c);
          const auto scaled = [&](int i) {
            const float value = Tile::number(x[i], c) * factor;
            return fma(value, 0, value);  // NaN for infinity
          };
          store_word(to, channel + c, place,
                     pack8<E4m3>(scaled(0), scaled(1), scaled(2), scaled(3)));
        }
      }
      for (int row = lane / kFours; row < kSumRows; row += kWarpThreads / kFours) {
        const auto one = [&](int i) { return tile.is_token(key_at(place + i)) ? 1.f : 0.f; };
        store_word(to, D + row, place, row == 0 ? pack8<E4m3>(one(0), one(1), one(2), one(3)) : 0);
      }
    });
  }
  VSA_DEVICE static void store_word(unsigned char* to, int row, int byte, uint32_t word) {
    *reinterpret_cast<uint32_t*>(to + Values::place(row, byte)) = word;
  }
};

}  // namespace vsa
