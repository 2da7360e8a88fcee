// SPDX-License-Identifier: Apache-2.0
// Text, ahead of the fine kernels: which rows of its tiles are real tokens, and copies of it with
// zeros in place of the others. Products give such rows no weight, but zero times NaN is NaN.
//
//   rows[tile] = a bit for each of 64 tokens       clean[token] = valid[token] ? x[token] : 0
//
// A lane makes eight of the bits, or copies 16 bytes. No lane needs another.
#pragma once
#include "kernels/fine/gates.h"

namespace vsa {

// A tensor whose text is copied.
struct TextToClean {
  TokenRows<const uint16_t> tokens;  // [batch, tokens, heads, head_dim], the video included
  Chunk* clean;                      // [batch, text, heads, head_dim]
  int heads;
  int suffix_begin;  // token
  int64_t lanes;     // that have something to do
};

struct CleanTextParams {
  static constexpr int kMost = 4;

  const uint8_t* valid;                // [batch, text] 1 for real tokens; null: all are
  int64_t batch_stride, token_stride;  // of valid
  int prefix, suffix;                  // tokens
  uint8_t* rows;                       // [batch, text tiles, 8], read as words of 64 bits
  int64_t row_lanes;                   // that make them
  TextToClean tensors[kMost];
  int count;     // of tensors
  int head_dim;  // the same for all

  VSA_DEVICE bool is_real(int batch, int text) const {
    return valid == nullptr || load_global(valid + batch * batch_stride + text * token_stride) != 0;
  }
};

class CleanText {
 public:
  static constexpr int kBytesOfRows = kTileRows / 8;

  // The lane's number counts bytes of rows, tiles and batch elements, fastest first.
  VSA_DEVICE static void rows(const CleanTextParams& p, int64_t lane) {
    const int of_prefix = ceil_div(p.prefix, kTileRows);
    const int tiles = of_prefix + ceil_div(p.suffix, kTileRows);
    const int batch = static_cast<int>(lane / (tiles * kBytesOfRows));
    const int byte = static_cast<int>(lane % (tiles * kBytesOfRows));
    const bool in_suffix = byte >= of_prefix * kBytesOfRows;
    const int first = (byte - (in_suffix ? of_prefix * kBytesOfRows : 0)) * 8;
    const int size = in_suffix ? p.suffix : p.prefix, before = in_suffix ? p.prefix : 0;
    unsigned bits = 0;
    VSA_UNROLL
    for (int i = 0; i < 8; ++i) {
      const int token = first + i;
      if (token < size && p.is_real(batch, before + token)) bits |= 1u << i;
    }
    p.rows[lane] = static_cast<uint8_t>(bits);
  }

  // The lane's number counts channels, heads, text and batch elements, fastest first.
  VSA_DEVICE static void copy(const CleanTextParams& p, int tensor, int64_t lane) {
    const TextToClean& x = p.tensors[tensor];
    const int chunks = p.head_dim / kChunkElements, text = p.prefix + p.suffix;
    const int64_t per_batch = int64_t{text} * x.heads * chunks;
    const int batch = static_cast<int>(lane / per_batch);
    const int in_batch = static_cast<int>(lane % per_batch);
    const int channel = in_batch % chunks * kChunkElements, row = in_batch / chunks;
    const int head = row % x.heads, at = row / x.heads;
    const int token = at < p.prefix ? at : x.suffix_begin + at - p.prefix;
    x.clean[lane] = p.is_real(batch, at) ? x.tokens.load(batch, token, head, channel) : Chunk{};
  }
};

}  // namespace vsa
