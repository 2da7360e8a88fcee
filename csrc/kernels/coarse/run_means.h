// SPDX-License-Identifier: Apache-2.0
// Means of the runs of every tile, for the scores of sub_block_scores.h, in the pass that makes the
// means of tiles: for up to three tensors in one launch, each value read once.
//
// A warp takes a tile and head, a lane a few neighbouring channels. It goes through the tile's
// tokens in order. A run is a sum of them one after the other; the mean of the tile is added up as
// in tile_means.h, to the bit. What remains of a run is a row of fp16, whose scale is that of its
// largest number in any lane: run_layout.h.
#pragma once
#include "kernels/coarse/run_layout.h"
#include "prim/warp.h"

namespace vsa {

struct TokensToRuns {
  const void* data;                                 // [batch, tokens, heads, head_dim]
  int64_t batch_stride, token_stride, head_stride;  // elements; channels are contiguous
  Grid grid;
  int64_t row_offsets[kTileRows];  // elements, of a tile's rows from its first
  int heads;
  float* means;         // [batch, heads, tiles, head_dim], null without
  unsigned char* rows;  // of runs, null without; so are their factors
  float* factors;
  bool are_keys;  // which order rows lie in
  int64_t warps;  // that have something to do
};

struct RunMeansParams {
  static constexpr int kMost = 3;

  TokensToRuns tensors[kMost];
  int count;        // of tensors
  int runs, slots;  // of a tile
};

// Wide: a lane's channels are aligned, and loaded at once.
template <class Element, int D, bool Wide>
class RunMeans {
 public:
  static constexpr int kTogether = 8;                 // tokens whose loads are in flight together
  static constexpr int kChannels = D / kWarpThreads;  // of a lane

  VSA_DEVICE static void run(const RunMeansParams& p, int tensor, int64_t warp) {
    RunMeans one(p, p.tensors[tensor], warp);
    one.add_up();
  }

 private:
  using Channels = Floats<kChannels>;
  struct Tokens {
    Channels x[kTogether];
  };
  struct alignas(2 * kChannels) Packed {
    uint32_t pairs[kChannels / 2];
  };

  // Heads are counted fastest: neighbouring warps read neighbouring memory.
  VSA_DEVICE RunMeans(const RunMeansParams& p, const TokensToRuns& x, int64_t warp)
      : p_(p),
        x_(x),
        head_(static_cast<int>(warp % x.heads)),
        tile_(static_cast<int>(warp / x.heads % x.grid.num_tiles())),
        batch_(static_cast<int>(warp / x.heads / x.grid.num_tiles())) {}

  VSA_DEVICE void add_up() {
    const Place place = x_.grid.place(tile_);
    uint64_t left = x_.grid.rows[place.clip];
    const int size = popcount(left), shorter = size / p_.runs, longer = size % p_.runs;
    const int64_t start = batch_ * x_.batch_stride + head_ * x_.head_stride +
                          x_.grid.token(place, 0) * x_.token_stride;
    int run = 0, wanted = shorter + (0 < longer), missing = wanted;
    clear(total_);
    clear(part_);
    for (int at = 0; at < x_.grid.tile.volume(); at += kTogether, left >>= kTogether) {
      load(start, at, left);
      if (x_.rows != nullptr) {
        VSA_UNROLL
        for (int i = 0; i < kTogether; ++i) {
          if ((left >> i & 1) == 0) continue;
          each_lane([&](int lane) { add(part_[lane], tokens_[lane].x[i]); });
          if (--missing > 0) continue;
          put_run(run++, wanted);
          missing = wanted = shorter + (run < longer);
        }
      }
      each_lane([&](int lane) {
        auto& token = tokens_[lane].x;
        VSA_UNROLL
        for (int half = kTogether / 2; half > 0; half /= 2) {
          VSA_UNROLL
          for (int i = 0; i < half; ++i) add(token[i], token[i + half]);
        }
        add(total_[lane], token[0]);
      });
    }
    if (x_.rows != nullptr)
      for (; run < p_.slots; ++run) put_nothing(run);
    if (x_.means != nullptr) put_mean(static_cast<float>(size));
  }

  VSA_DEVICE void load(int64_t start, int at, uint64_t left) {
    each_lane([&](int lane) {
      VSA_UNROLL
      for (int i = 0; i < kTogether; ++i) {
        const bool there = (left >> i & 1) != 0;
        const int64_t from = start + (there ? x_.row_offsets[at + i] : 0) + lane * kChannels;
        if constexpr (Wide) {
          tokens_[lane].x[i] = load_floats<Element, kChannels>(x_.data, from, there);
        } else {
          VSA_UNROLL
          for (int c = 0; c < kChannels; ++c)
            tokens_[lane].x[i].x[c] = load_floats<Element, 1>(x_.data, from + c, there).x[0];
        }
      }
    });
  }

  VSA_DEVICE void put_run(int run, int size) {
    each_lane([&](int lane) {
      VSA_UNROLL
      for (float& x : part_[lane].x) x /= static_cast<float>(size);
    });
    // The bits of numbers without their sign are in the order of the numbers.
    const int top = greatest([&](int lane) {
      int own = 0;
      VSA_UNROLL
      for (const float x : part_[lane].x) {
        const int bits = float_bits(x) & 0x7fffffff;
        own = bits > own ? bits : own;
      }
      return own;
    });
    const int exponent = top >> runs::kExponentBits;
    put_row(run, float_of(runs::scale_bits(exponent)), float_of(runs::factor_bits(exponent)));
    clear(part_);
  }

  VSA_DEVICE void put_nothing(int run) { put_row(run, 0, -1); }

  VSA_DEVICE void put_row(int slot, float scale, float factor) {
    const int64_t of_head = int64_t{batch_} * x_.heads + head_;
    const int64_t row = (of_head * x_.grid.num_tiles() + tile_) * p_.slots + slot;
    const int tiles = runs::block_tiles(p_.slots);
    const int64_t block = of_head * runs::key_blocks(x_.grid.num_tiles(), p_.slots) + tile_ / tiles;
    const int in_block = tile_ % tiles;
    each_lane([&](int lane) {
      Packed packed;
      VSA_UNROLL
      for (int c = 0; c < kChannels; c += 2)
        packed.pairs[c / 2] = pack<Fp16>(part_[lane].x[c] * scale, part_[lane].x[c + 1] * scale);
      const int channel = lane * kChannels;
      const int64_t byte =
          x_.are_keys ? block * kTileRows * D * kElementBytes +
                            runs::image_byte(runs::key_row(in_block, slot, p_.slots), channel)
                      : (row * D + channel) * kElementBytes;
      *reinterpret_cast<Packed*>(x_.rows + byte) = packed;
      if (lane == 0) {
        const auto at = runs::lane_quad(in_block, slot, p_.slots);
        x_.factors[x_.are_keys ? block * kTileRows + runs::factor_place(at, slot % runs::kQuad)
                               : row] = factor;
      }
    });
  }

  VSA_DEVICE void put_mean(float size) {
    const int64_t of_head = int64_t{batch_} * x_.heads + head_;
    float* to = x_.means + (of_head * x_.grid.num_tiles() + tile_) * D;
    each_lane([&](int lane) {
      VSA_UNROLL
      for (int c = 0; c < kChannels; ++c) to[lane * kChannels + c] = total_[lane].x[c] / size;
    });
  }

  VSA_DEVICE static void clear(PerLane<Channels>& sums) {
    each_lane([&](int lane) { sums[lane] = {}; });
  }
  VSA_DEVICE static void add(Channels& total, const Channels& more) {
    VSA_UNROLL
    for (int c = 0; c < kChannels; ++c) total.x[c] += more.x[c];
  }

  const RunMeansParams& p_;
  const TokensToRuns& x_;
  const int head_, tile_, batch_;
  PerLane<Tokens> tokens_;
  PerLane<Channels> total_, part_;  // of the tile, of the run
};

}  // namespace vsa
