// SPDX-License-Identifier: Apache-2.0
// Gates and rows of tokens, as the kernels read and write them token by token.
//
// Lanes share the channels of a token, eight neighbouring ones each, so that a warp works on
// several tokens at a time.
#pragma once
#include "kernels/schedule/sequence.h"

namespace vsa {

// A lane's share of a token.
struct Channels {
  float x[kChunkElements];
};

template <class Element>
VSA_DEVICE Channels widen(const Chunk& chunk) {
  Channels wide;
  VSA_UNROLL
  for (int i = 0; i < kChunkElements / 2; ++i) {
    wide.x[2 * i] = widen_low<Element>(chunk.pairs[i]);
    wide.x[2 * i + 1] = widen_high<Element>(chunk.pairs[i]);
  }
  return wide;
}

template <class Element>
VSA_DEVICE Chunk narrow(const Channels& wide) {
  Chunk chunk;
  VSA_UNROLL
  for (int i = 0; i < kChunkElements / 2; ++i)
    chunk.pairs[i] = pack<Element>(wide.x[2 * i], wide.x[2 * i + 1]);
  return chunk;
}

// 16-bit tokens that are read or written token by token. Chunks of channels are 16 aligned bytes.
template <class T>
struct TokenRows {
  T* data;  // [batch, tokens, heads, head_dim]; null: not there
  int64_t batch_stride, token_stride, head_stride;  // elements

  VSA_DEVICE T* row(int batch, int token, int head) const {
    return data + batch * batch_stride + token * token_stride + head * head_stride;
  }
  VSA_DEVICE Chunk load(int batch, int token, int head, int channel) const {
    return load_global(reinterpret_cast<const Chunk*>(row(batch, token, head) + channel));
  }
  VSA_DEVICE void store(int batch, int token, int head, int channel, const Chunk& chunk) const {
    *reinterpret_cast<Chunk*>(row(batch, token, head) + channel) = chunk;
  }
};

// A tensor that was broadcast to [batch, tokens, heads, head_dim]: any strides, zeros among them.
struct Gate {
  enum class Reading { Vectorized, Scalar, Fp32 };

  const void* data;  // null: not there
  bool fp32;         //, else of the kernels' 16-bit type
  bool vectorized;   // 16 bits, and every eight channels are 16 aligned bytes
  int64_t batch_stride, token_stride, head_stride, channel_stride;  // elements

  VSA_DEVICE int64_t offset(int batch, int token, int head) const {
    return batch * batch_stride + token * token_stride + head * head_stride;
  }
  template <class Element>
  VSA_DEVICE float value(int64_t offset, int channel) const {
    const int64_t i = offset + channel * channel_stride;
    return fp32 ? load_global(static_cast<const float*>(data) + i)
                : widen_low<Element>(load_global(static_cast<const uint16_t*>(data) + i));
  }
  // A lane's share, from `channel` on.
  template <class Element>
  VSA_DEVICE Channels values(int64_t offset, int channel) const {
    if (vectorized) {
      const uint16_t* first = static_cast<const uint16_t*>(data) + offset + channel;
      return widen<Element>(load_global(reinterpret_cast<const Chunk*>(first)));
    }
    Channels found;
    VSA_UNROLL
    for (int c = 0; c < kChunkElements; ++c) found.x[c] = value<Element>(offset, channel + c);
    return found;
  }
  // Channels `channel` and `channel + 1`, the first of them even, where `How` is known to fit.
  template <class Element, Reading How>
  VSA_DEVICE void read(float (&values)[2], int64_t offset, int channel) const {
    if constexpr (How == Reading::Vectorized) {
      const uint16_t* first = static_cast<const uint16_t*>(data) + offset + channel;
      const uint32_t both = load_global(reinterpret_cast<const uint32_t*>(first));
      values[0] = widen_low<Element>(both);
      values[1] = widen_high<Element>(both);
    } else {
      VSA_UNROLL
      for (int c = 0; c < 2; ++c) {
        // Places of many channels, kept from one token to the next, would not fit into registers.
        const int64_t i = offset + no_hoist(channel + c) * channel_stride;
        if constexpr (How == Reading::Fp32)
          values[c] = load_global(static_cast<const float*>(data) + i);
        else
          values[c] = widen_low<Element>(load_global(static_cast<const uint16_t*>(data) + i));
      }
    }
  }
};

// Where the gradient of a gate goes before it is summed over what was broadcast: contiguous
// [batch, tokens, heads, head_dim] of the gate's type.
struct GateGradient {
  void* data;
  bool fp32;

  // first: of the channels, counted from the tensor's first
  template <class Element>
  VSA_DEVICE void store(int64_t first, const Channels& gradient) const {
    if (fp32) {
      VSA_UNROLL
      for (int c = 0; c < kChunkElements; ++c) static_cast<float*>(data)[first + c] = gradient.x[c];
    } else {
      static_cast<Chunk*>(data)[first / kChunkElements] = narrow<Element>(gradient);
    }
  }
};

// How the lanes of a warp share tokens.
template <int D>
struct TokenLanes {
  static constexpr int kLanes = D / kChunkElements;      // of a token
  static constexpr int kTokens = kWarpThreads / kLanes;  // of a warp at a time

  VSA_DEVICE static int channel(int lane) { return lane % kLanes * kChunkElements; }
  VSA_DEVICE static int token(int lane) { return lane / kLanes; }
};

// A tile's row of the coarse output, a lane's share. of_head: batch element and head
template <int D>
VSA_DEVICE const float* coarse_row(const float* coarse,
                                   const TiledSequence& queries,
                                   int64_t of_head,
                                   int tile) {
  return coarse + (of_head * queries.grid.num_tiles() + tile) * D;
}

}  // namespace vsa
