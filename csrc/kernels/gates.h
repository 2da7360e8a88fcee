// SPDX-License-Identifier: Apache-2.0
// combine, token by token: out = gate_fine * fine + gate_coarse * coarse[tile of the token], and
// its gradients.
//
// A warp holds a token's channels, in pairs: lane l has pairs l * kPairs to l * kPairs + kPairs
// - 1.
#pragma once
#include "kernels/params.h"

namespace vsa {

// 16-bit tokens that are read or written token by token.
template <class T>
struct TokenRows {
  T* data;  // [batch, tokens, heads, head_dim]; null: not there
  int64_t batch_stride, token_stride, head_stride;  // elements

  VSA_DEVICE T* row(int batch, int token, int head) const {
    return data + batch * batch_stride + token * token_stride + head * head_stride;
  }
};

// A tensor that was broadcast to [batch, tokens, heads, head_dim]: any strides, zeros among them.
struct Gate {
  enum class Reading { Pairs, Narrow, Wide };

  const void* data;  // null: not there
  bool wide;         // fp32, else of the kernels' 16-bit type
  bool paired;       // 16 bits, and channels 2i and 2i + 1 are an aligned word of 32
  int64_t batch_stride, token_stride, head_stride, channel_stride;  // elements

  VSA_DEVICE int64_t offset(int batch, int token, int head) const {
    return batch * batch_stride + token * token_stride + head * head_stride;
  }
  template <class Element>
  VSA_DEVICE float value(int64_t offset, int channel) const {
    const int64_t i = offset + channel * channel_stride;
    return wide ? load_global(static_cast<const float*>(data) + i)
                : widen_low<Element>(load_global(static_cast<const uint16_t*>(data) + i));
  }
  // Channels `channel` and `channel + 1`, the first of them even, where `How` is known to fit.
  template <class Element, Reading How>
  VSA_DEVICE void read(float (&values)[2], int64_t offset, int channel) const {
    if constexpr (How == Reading::Pairs) {
      const uint16_t* first = static_cast<const uint16_t*>(data) + offset + channel;
      const uint32_t both = load_global(reinterpret_cast<const uint32_t*>(first));
      values[0] = widen_low<Element>(both);
      values[1] = widen_high<Element>(both);
    } else {
      VSA_UNROLL
      for (int c = 0; c < 2; ++c) {
        // Places of many channels, kept from one token to the next, would not fit into registers.
        const int64_t i = offset + unhoisted(channel + c) * channel_stride;
        if constexpr (How == Reading::Wide)
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
  bool wide;

  template <class Element>
  VSA_DEVICE void store(int64_t pair, float low, float high) const {
    if (wide) {
      static_cast<float*>(data)[2 * pair] = low;
      static_cast<float*>(data)[2 * pair + 1] = high;
    } else {
      static_cast<uint32_t*>(data)[pair] = pack<Element>(low, high);
    }
  }
};

struct CombineParams {
  TokenRows<const uint16_t> fine;
  TokenRows<uint16_t> out;
  Gate gate_fine, gate_coarse;
  const float* coarse;  // [batch, heads, n, head_dim], with gate_coarse
  TiledSequence queries;
  int heads;
};

// How a warp's lanes share the channels of a token, and where they find them.
template <int D>
struct LanePairs {
  static constexpr int kPairs = D / (2 * kWarpThreads);

  VSA_DEVICE static uint32_t load(const uint16_t* row, int pair) {
    return load_global(reinterpret_cast<const uint32_t*>(row) + pair);
  }
  VSA_DEVICE static const float* coarse_row(const float* coarse,
                                            const TiledSequence& queries,
                                            int64_t of_head,
                                            int tile) {
    return coarse + (of_head * queries.grid.num_tiles() + tile) * D;
  }
};

// One row of a tile, one lane. The row must be a token.
template <class Element, int D>
VSA_DEVICE void combine_row(const CombineParams& p,
                            const TilePlace& at,
                            int batch,
                            int head,
                            int tile,
                            int row,
                            int lane) {
  using Lane = LanePairs<D>;
  const int token = p.queries.token(at, row);
  const bool has_coarse = p.gate_coarse.data != nullptr && at.region == Region::Video;
  const int64_t of_head = int64_t{batch} * p.heads + head;
  const uint16_t* fine = p.fine.row(batch, token, head);
  auto* out = reinterpret_cast<uint32_t*>(p.out.row(batch, token, head));
  const int64_t gate_fine = p.gate_fine.offset(batch, token, head);
  const int64_t gate_coarse = p.gate_coarse.offset(batch, token, head);
  VSA_UNROLL
  for (int i = 0; i < Lane::kPairs; ++i) {
    const int pair = lane * Lane::kPairs + i;
    const uint32_t both = Lane::load(fine, pair);
    float x[2] = {widen_low<Element>(both), widen_high<Element>(both)};
    VSA_UNROLL
    for (int c = 0; c < 2; ++c) {
      const int channel = 2 * pair + c;
      if (p.gate_fine.data != nullptr)
        x[c] *= p.gate_fine.template value<Element>(gate_fine, channel);
      if (has_coarse) {
        const float* coarse = Lane::coarse_row(p.coarse, p.queries, of_head, tile);
        x[c] = fma(p.gate_coarse.template value<Element>(gate_coarse, channel),
                   load_global(coarse + channel), x[c]);
      }
    }
    out[pair] = pack<Element>(x[0], x[1]);
  }
}

}  // namespace vsa
