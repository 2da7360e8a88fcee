// SPDX-License-Identifier: Apache-2.0
// The current chunk of a video that comes chunk by chunk: means of the tiles of its queries, keys
// and values, and in the same pass over memory keys and values into their slot of a cache.
//
// A lane does what it does in tile_means.h and stores the tokens that it reads; the means of keys
// and values go among those of other slots. Text that comes along is copied by a launch of its own,
// without which this one would spill registers.
#pragma once
#include "kernels/coarse/tile_means.h"

namespace vsa {

// Keys or values of a cache, 16 bits: [batch, text and slots, heads, head_dim].
struct SlotsToFill {
  uint16_t* text;   // its first token, null where no text comes along
  uint16_t* video;  // the first token of the first slot; null of queries, which are not kept
  int64_t batch_stride, token_stride, head_stride;  // elements
  int64_t means_stride;                             // numbers from head to head
  int64_t text_lanes;                               // that have text to copy
};

struct ChunkMeansParams : TileMeansParams {
  SlotsToFill slots[kMost];
  const int64_t* slot;        // [1] the chunk's slot; null: the first
  int row_tokens[kTileRows];  // of a tile's rows from its first
};

// Where a lane's tile goes.
template <class Element, int N>
class KeptInSlot {
 public:
  using Params = ChunkMeansParams;
  static constexpr bool kKeeps = true;

  // first: token of the tile in the sequence
  VSA_DEVICE KeptInSlot(const Params& p, int tensor, int batch, int head, int first, int channel)
      : p_(p), to_(p.slots[tensor]) {
    const TokensToMean& x = p.tensors[tensor];
    slot_ = to_.video == nullptr || p.slot == nullptr ? 0 : static_cast<int>(load_global(p.slot));
    means_ = (int64_t{batch} * x.heads + head) * to_.means_stride + channel +
             int64_t{slot_} * x.grid.num_tiles() * p.head_dim;
    const int64_t token = int64_t{slot_} * x.grid.video.volume() + first - x.grid.prefix;
    tokens_ =
        batch * to_.batch_stride + head * to_.head_stride + token * to_.token_stride + channel;
  }

  VSA_DEVICE void token(int row, const Floats<N>& values) const {
    if (to_.video != nullptr)
      store(to_.video + tokens_ + p_.row_tokens[row] * to_.token_stride, values);
  }
  VSA_DEVICE int64_t mean(int tile) const { return means_ + int64_t{tile} * p_.head_dim; }

  // The number that they were read as, for 16 bits became 32.
  VSA_DEVICE static void store(uint16_t* to, const Floats<N>& values) {
    if constexpr (N == 1) {
      *to = static_cast<uint16_t>(pack<Element>(values.x[0], 0.f));
    } else {
      Chunk chunk;
      VSA_UNROLL
      for (int i = 0; i < N / 2; ++i)
        chunk.pairs[i] = pack<Element>(values.x[2 * i], values.x[2 * i + 1]);
      *reinterpret_cast<Chunk*>(to) = chunk;
    }
  }

 private:
  const Params& p_;
  const SlotsToFill& to_;
  int slot_;
  int64_t means_, tokens_;
};

// Channels are taken N at a time, 8 or 1.
template <class Element, int N>
class ChunkMeans {
 public:
  using Kept = KeptInSlot<Element, N>;
  using Params = ChunkMeansParams;

  VSA_DEVICE static void run(const Params& p, int tensor, int64_t lane) {
    TileMeans<Element, N, false, Kept>::run(p, tensor, lane);
  }

  // The lane's number counts channels, heads, text and batch elements, fastest first.
  VSA_DEVICE static void copy_text(const Params& p, int tensor, int lane) {
    const TokensToMean& x = p.tensors[tensor];
    const SlotsToFill& to = p.slots[tensor];
    const int chunks = p.head_dim / N, row = lane / chunks;
    const int channel = lane % chunks * N, head = row % x.heads;
    const int text = row / x.heads, token = text % x.grid.prefix, batch = text / x.grid.prefix;
    const int64_t from = batch * x.batch_stride + head * x.head_stride + token * x.token_stride;
    const int64_t at = batch * to.batch_stride + head * to.head_stride + token * to.token_stride;
    Kept::store(to.text + at + channel, load_floats<Element, N>(x.data, from + channel, true));
  }
};

}  // namespace vsa
