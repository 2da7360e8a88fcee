// SPDX-License-Identifier: Apache-2.0
// The fine stage as plain functions: what Python passes, in; an error sentence, out. One function
// launches the kernels on a GPU, the other runs the very same kernels on the emulator.
#pragma once
#include <climits>
#include <cstdint>
#include <string>

#include "prim/facts.h"

namespace vsa::launch {

enum class Dtype { Bf16, Fp16, Fp32 };

// Values that kernels are compiled for. No std::integer_sequence: that is of whole numbers alone,
// and GCC 13's library refuses one of an enum.
template <auto... values>
struct Values {};

// What the kernels of the fine stage are compiled for, stated here alone: fine_params.h makes the
// kernels from it, the binding tells Python.
using FineHeadDims = Values<64, 128>;
using FineDtypes = Values<Dtype::Bf16, Dtype::Fp16>;

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
  bool fp32 = false;           // else of the call's dtype
  int64_t batch_stride = 0, token_stride = 0, head_stride = 0, channel_stride = 0;
};

struct Gates {
  GateView fine, coarse;
  const float* coarse_rows = nullptr;  // [batch, heads, n_q, head_dim], with the coarse gate
};

// What both directions are told.
struct FineProblem {
  Grid grid, kv_grid;
  int batch, heads, kv_heads, head_dim;
  Dtype dtype;
  float scale;
  const uint32_t* bitmap;           // [batch, heads, n_q, words(n_k)]
  const int* query_axes;            // [batch, heads] of AxisChoice
  const uint64_t* query_text_rows;  // [batch, text tiles of the queries], null without text
  const uint64_t* key_text_rows;    // [batch, text tiles of the keys], null without text
  // Of padded tiles the real tokens, [n_q] and [n_k] (TileSizes); null for grids of a video.
  // Padding of what tiles are stored to becomes zeros; lse has to hold -inf there beforehand, and
  // gradients of gates zeros. No key tile without a token may be selected.
  const int *sizes, *kv_sizes;
};

struct FineForward : FineProblem {
  SequenceView q, k, v, out;
  SequenceView fine;  // with gates, where the fine stage's part goes; null where nobody wants it
  Gates gates;        // with any, out is gate_fine * fine + gate_coarse * coarse[tile of the token]
  float* lse;         // [batch, heads, S_q]
  int* tile_counter;  // one int, which AxisChoice has cleared
  // Of GroupSort, the query_tiles_per_group of them together; null: as they come, text first.
  const int *order, *long_ones;
};

struct FineBackward : FineProblem {
  SequenceView q, k, v;
  SequenceView grad_fine;  // gradient of the fine stage's output
  SequenceView grad_q, grad_k, grad_v;
  TokenView fine_out;  // the fine stage's output
  TokenView grad_out;  // gradient of the operation's output
  // With a fine gate: the tensor of grad_fine as a whole, which the pass over tokens writes.
  TokenView grad_fine_tokens;
  Gates gates;
  void *grad_gate_fine, *grad_gate_coarse;  // [batch, tokens, heads, head_dim] of the gate's type
  float* grad_coarse;                       // [batch, heads, n_q, head_dim]
  // [batch, heads, tiles, head_dim] gradients of tile means, which their tokens share; null without
  const float *grad_q_means, *grad_k_means, *grad_v_means;
  const uint32_t* transposed_bitmap;  // [batch, heads, n_k, words(n_q)]
  const int* key_axes;                // [batch, kv_heads] of AxisChoice
  // Of GroupSort, of kKeyTilesPerGroup key tiles together and of backward_query_tiles_per_group
  // query tiles; for these null: as they come, text first.
  const int *key_order, *long_keys, *query_order, *long_queries;
  const float* lse;       // [batch, heads, S_q]
  const float* grad_lse;  // [batch, heads, S_q], or null
  int* tile_counters;     // two ints, which AxisChoice has cleared
  // For one pass (head_dim 64, no text, no padded tiles) [batch, heads, n_q, 64, 64], written and
  // read; null for two passes.
  float* grad_q_sums;
  void* row_stats;  // [batch, heads, tiles of the queries, 2, 64] floats, written and read
};

// Neighbouring tiles that a block works on together, one for each consumer: query tiles of the
// forward, and key and query tiles of the backward.
constexpr int kKeyTilesPerGroup = 2;
constexpr int query_tiles_per_group(int head_dim) { return head_dim == 128 ? 3 : 4; }
constexpr int backward_query_tiles_per_group(int head_dim) { return head_dim == 128 ? 2 : 3; }

// Bitmaps of many heads, transposed, and how many bits each row then has.
struct BitmapTranspose {
  const uint32_t* source;  // [bitmaps, rows, words(columns)]
  uint32_t* target;        // [bitmaps, columns, words(rows)]
  int* counts;             // [bitmaps, columns]
  int bitmaps, rows, columns;
};

// How the tiles of a head, or of a group of heads, are put in order: along which axis those that
// are worked on together are neighbours, and whether the last one comes first. A few tiles answer
// for all.
//
// Tiles that have rows in common share their loads: they are neighbours along t if that makes more
// of it than along w. But a work tile takes as long as the longest of its rows, so what rows differ
// by in length counts against an axis. Where rows grow by a fifth or more from the first samples to
// the last, as under a causal mask, the last come first: blocks would end far apart if the longest
// came last.
struct AxisChoice {
  static constexpr int kSamples = 32;

  const uint32_t* bitmap;  // [batch, heads, tiles, words]
  int* axes;               // [batch, groups] kAlongW or kAlongT, and kBackwards where it is so
  int batch, heads, groups, words;
  Axes tiles;
  int* counters;  // as many ints are set to 0 for the kernels that come next; null for none
  int count;

  // What words of a sample and its neighbours say, to be summed over words and the heads of a
  // group. Neighbours: the next tiles along t and w.
  struct Sample {
    int length = 0;                  // of its row
    int shared = 0;                  // tiles in common along t, less those along w
    int longer_t = 0, longer_w = 0;  // how many tiles more the neighbour's row has

    VSA_HD void add(const Sample& other) {
      length += other.length;
      shared += other.shared;
      longer_t += other.longer_t;
      longer_w += other.longer_w;
    }
  };
  // What samples say, to be summed over them.
  struct Answer {
    int along_t;    // for t, or if negative for w
    int backwards;  // for the last tile first, or if negative against it
  };

  VSA_HD int sharing() const { return heads / groups; }
  // Samples are a lattice, even along each axis.
  // head: counted over all batch elements
  VSA_HD Sample look(int head, int sample, int word) const {
    const int t = sample * (tiles.t - 1) / kSamples;
    const int h = sample * 5 % kSamples * tiles.h / kSamples;
    const int w = sample * 7 % kSamples * (tiles.w - 1) / kSamples;
    const int64_t tile = int64_t{head} * tiles.volume() + (t * tiles.h + h) * tiles.w + w;
    const uint32_t* row = bitmap + tile * words + word;
    const uint32_t own = row[0];
    Sample found;
    found.length = popcount(own);
    if (tiles.t == 1 || tiles.w == 1) return found;
    const uint32_t along_w = row[words], along_t = row[tiles.h * tiles.w * words];
    found.shared = popcount(own & along_t) - popcount(own & along_w);
    found.longer_t = popcount(along_t) - found.length;
    found.longer_w = popcount(along_w) - found.length;
    return found;
  }
  // whole: a sample, summed up
  VSA_HD Answer answer(const Sample& whole, int sample) const {
    return {whole.shared - size_of(whole.longer_t) + size_of(whole.longer_w),
            (2 * sample - kSamples) * whole.length};
  }
  // whole: of all samples
  VSA_HD int axis(const Answer& whole) const {
    const bool along_t = tiles.w == 1 ? tiles.t > 1 : whole.along_t > 0;
    return (along_t ? kAlongT : kAlongW) | (whole.backwards > 0 ? kBackwards : 0);
  }

 private:
  VSA_HD static int size_of(int x) { return x < 0 ? -x : x; }
};

// In which order groups of neighbouring tiles are worked on within each head: by the longest row of
// the bitmap among them, equal ones as they come. Text attends everything and is attended by
// everyone, so its groups stay first. Work tiles run on one multiprocessor each, so those that take
// far longer than most have to begin before all others of all heads: how many that are in the head
// that has most of them is counted, too.
struct GroupSort {
  const int* counts;  // [batch, heads, tiles] length of each row
  const int* axes;    // [batch, groups of heads] along which tiles are neighbours
  int* order;         // [batch, groups of heads, groups]
  int* long_ones;     // [1], which AxisChoice has cleared
  int batch, heads, head_groups, tiles, text_tiles;
  int layers;    // tiles along t
  int together;  // tiles of a group

  static constexpr int kLong = 2;   // times the mean
  static constexpr int kMost = 16;  // of so many groups one, since heads then share no loads

  // What is known of all groups of a head, to be summed over them.
  struct Sum {
    int64_t length = 0;
    int groups = 0;

    VSA_HD void add(int length_of_one) {
      if (length_of_one == INT_MAX) return;
      length += length_of_one;
      ++groups;
    }
  };

  VSA_HD int groups() const { return ceil_div(text_tiles + tiles, together); }
  // The longest row of a group, that is of all heads that share it. head: counted over all batch
  // elements
  VSA_HD int length(int head, int group) const {
    const int sharing = heads / head_groups;
    int longest = 0;
    for (int i = 0; i < together; ++i) {
      const int place = group * together + i - text_tiles;
      if (place < 0) return INT_MAX;
      if (place >= tiles) break;
      const int tile = serpentine_tile(place, axes[head], layers, tiles / layers);
      int length = 0;
      for (int h = head * sharing; h < (head + 1) * sharing; ++h)
        length += counts[int64_t{h} * tiles + tile];
      longest = length > longest ? length : longest;
    }
    return longest;
  }
  // How many come before all others, where so many are long.
  VSA_HD int first_groups(int long_ones) const {
    const int of_text = ceil_div(text_tiles, together), most = ceil_div(groups(), kMost);
    const int limit = most > of_text ? most : of_text;
    return long_ones < limit ? long_ones : limit;
  }
  VSA_HD static bool is_long(int length, const Sum& all) {
    return length == INT_MAX || int64_t{length} * all.groups > kLong * all.length;
  }
};

// Each returns an error sentence, empty when all went well. The first of a pair launches kernels on
// a GPU, the second runs the same kernels on the CPU.
std::string fine_forward(const FineForward& call, int device, void* stream);
std::string fine_forward_emulated(const FineForward& call, int blocks, unsigned seed);
// What the passes of fine_backward need of every query, and the gradients that belong to the gates.
std::string backward_rows(const FineBackward& call, int device, void* stream);
std::string backward_rows_emulated(const FineBackward& call);
std::string fine_backward(const FineBackward& call, int device, void* stream);
std::string fine_backward_emulated(const FineBackward& call, int blocks, unsigned seed);
std::string transpose_bitmaps(const BitmapTranspose& call, int device, void* stream);
std::string transpose_bitmaps_emulated(const BitmapTranspose& call);
std::string choose_axes(const AxisChoice& call, int device, void* stream);
std::string choose_axes_emulated(const AxisChoice& call);
std::string sort_groups(const GroupSort& call, int device, void* stream);
std::string sort_groups_emulated(const GroupSort& call);

}  // namespace vsa::launch
