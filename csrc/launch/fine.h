// SPDX-License-Identifier: Apache-2.0
// The fine stage as plain functions: what Python passes, in; an error sentence, out. One function
// launches the kernels on a GPU, the other runs the very same kernels on the emulator.
#pragma once
#include <climits>
#include <cstdint>
#include <string>

#include "prim/facts.h"

namespace vsa::launch {

enum class ElementType { Bf16, Fp16 };

// Tokens of one tensor; strides in elements, channels contiguous.
struct TokenView {
  const void* data = nullptr;  // [batch, tokens, heads, head_dim]
  int64_t batch_stride = 0, token_stride = 0, head_stride = 0;
};

// A sequence's tensor: text that has been copied apart has views of its own.
struct SequenceView {
  TokenView video, prefix, suffix;
};

// A gate as it was broadcast to [batch, tokens, heads, head_dim], channel stride included.
struct GateView {
  const void* data = nullptr;  // null: not there
  bool wide = false;           // fp32
  int64_t batch_stride = 0, token_stride = 0, head_stride = 0, channel_stride = 0;
};

struct Gates {
  GateView fine, coarse;
  const float* coarse_rows = nullptr;  // [batch, heads, n_q, head_dim], with the coarse gate
};

struct FineForward {
  SequenceView q, k, v, out;
  Gates gates;  // with any, out is combine's and the fine stage's part is not kept
  Grid grid, kv_grid;
  int batch, heads, kv_heads, head_dim;
  ElementType element;
  float scale;
  const uint32_t* selected;         // [batch, heads, n_q, words]
  const uint64_t* query_text_rows;  // [batch, text tiles of the queries], null without text
  const uint64_t* key_text_rows;    // likewise of the keys
  const int* query_axes;            // [batch, heads] of AxisChoice
  float* lse;                       // [batch, heads, S_q]
  int* tickets;                     // one int of scratch
};

// out = gate_fine * fine + gate_coarse * coarse[tile of the token]
struct Combine {
  TokenView fine, out;  // whole sequences
  Gates gates;
  Grid grid;
  int batch, heads, head_dim;
  ElementType element;
};

struct FineBackward {
  SequenceView q, k, v, grad_out, grad_q, grad_k, grad_v;
  TokenView whole_out;       // the fine stage's, the whole sequence
  TokenView whole_gradient;  // of the whole operation's output
  Gates gates;
  TokenView whole_grad_out;                 // with a fine gate: written, and what grad_out shows
  void *grad_gate_fine, *grad_gate_coarse;  // [batch, tokens, heads, head_dim] of the gate's type
  float* grad_coarse;                       // [batch, heads, n_q, head_dim]
  Grid grid, kv_grid;
  int batch, heads, kv_heads, head_dim;
  ElementType element;
  float scale;
  const uint32_t* selected;         // [batch, heads, n_q, words]
  const uint32_t* transposed;       // [batch, heads, n_k, words]
  const int* query_axes;            // [batch, heads] of AxisChoice
  const int* key_axes;              // [batch, kv_heads] likewise
  const int* order;                 // [batch, kv_heads, groups of key tiles]
  const uint64_t* query_text_rows;  // as above
  const uint64_t* key_text_rows;
  // [batch, heads, tiles, head_dim] gradients of tile means, which their tokens share; null without
  const float *grad_q_means, *grad_k_means, *grad_v_means;
  const float* lse;       // [batch, heads, S_q]
  const float* grad_lse;  // likewise, or null
  int* tickets;           // two ints of scratch
  void* row_stats;        // [batch, heads, tiles of the queries, 2, 64] floats, written and read
};

// Neighbouring key tiles that the backward treats as one group.
constexpr int kKeyTilesPerGroup = 2;

// Bitmaps of many heads, transposed, and how many bits each row then has.
struct BitmapTranspose {
  const uint32_t* from;  // [bitmaps, rows, words(columns)]
  uint32_t* to;          // [bitmaps, columns, words(rows)]
  int* counts;           // [bitmaps, columns]
  int bitmaps, rows, columns;
};

// Along which axis tiles that are worked on together are neighbours, for each head or each group of
// heads: t where tiles have more of their rows in common with the next along t than along w. A few
// tiles answer for all.
struct AxisChoice {
  static constexpr int kSamples = 32;

  const uint32_t* rows;  // [batch, heads, tiles, words] bitmap rows of the tiles
  int* axes;             // [batch, groups]
  int batch, heads, groups, words;
  Axes tiles;

  VSA_HD int sharing() const { return heads / groups; }
  // How many more tiles a sample wants together with the next along t than with the next along w,
  // of those in one word. Samples are a lattice, even along each axis.
  // head: of those of all batch elements
  VSA_HD int preference(int head, int sample, int word) const {
    if (tiles.t == 1 || tiles.w == 1) return 0;
    const int t = sample * (tiles.t - 1) / kSamples;
    const int h = sample * 5 % kSamples * tiles.h / kSamples;
    const int w = sample * 7 % kSamples * (tiles.w - 1) / kSamples;
    const int64_t tile = int64_t{head} * tiles.volume() + (t * tiles.h + h) * tiles.w + w;
    const uint32_t* row = rows + tile * words + word;
    const uint32_t own = row[0], along_w = row[words], along_t = row[tiles.h * tiles.w * words];
    return popcount(own & along_t) - popcount(own & along_w);
  }
  // preference: summed over samples, words and the heads of a group
  VSA_HD int axis(int preference) const {
    const bool along_t = tiles.w == 1 ? tiles.t > 1 : preference > 0;
    return along_t ? kAlongT : kAlongW;
  }
};

// In which order the groups of neighbouring key tiles are worked on within each key head: by their
// longest column, equal ones as they come. Text is attended by everyone, so its groups stay first.
struct ColumnOrder {
  const int* counts;  // [batch, heads, columns] queries of each video tile of keys
  const int* axes;    // [batch, kv_heads] along which key tiles are neighbours
  int* order;         // [batch, kv_heads, groups]
  int batch, heads, kv_heads, columns, text_tiles;
  int layers;  // tiles along t

  VSA_HD int groups() const { return ceil_div(text_tiles + columns, kKeyTilesPerGroup); }
  // The longest column of a group. head: of the keys, those of all batch elements in one row
  VSA_HD int length(int head, int group) const {
    const int sharing = heads / kv_heads;  // query heads
    int longest = 0;
    for (int i = 0; i < kKeyTilesPerGroup; ++i) {
      const int place = group * kKeyTilesPerGroup + i - text_tiles;
      if (place < 0) return INT_MAX;
      if (place >= columns) break;
      const int column = tile_in_turn(place, axes[head], layers, columns / layers);
      int queries = 0;
      for (int h = head * sharing; h < (head + 1) * sharing; ++h)
        queries += counts[int64_t{h} * columns + column];
      longest = queries > longest ? queries : longest;
    }
    return longest;
  }
};

// Empty when all went well.
std::string fine_forward(const FineForward& call, int device, void* stream);
std::string fine_forward_emulated(const FineForward& call, int blocks, unsigned seed);
std::string combine(const Combine& call, int device, void* stream);
std::string combine_on_host(const Combine& call);
// What the passes of fine_backward need of every query, and the gradients that belong to the gates.
std::string backward_rows(const FineBackward& call, int device, void* stream);
std::string backward_rows_on_host(const FineBackward& call);
std::string fine_backward(const FineBackward& call, int device, void* stream);
std::string fine_backward_emulated(const FineBackward& call, int blocks, unsigned seed);
std::string transpose_bitmaps(const BitmapTranspose& call, void* stream);
std::string transpose_bitmaps_on_host(const BitmapTranspose& call);
std::string choose_axes(const AxisChoice& call, void* stream);
std::string choose_axes_on_host(const AxisChoice& call);
std::string order_columns(const ColumnOrder& call, void* stream);
std::string order_columns_on_host(const ColumnOrder& call);

}  // namespace vsa::launch
