// SPDX-License-Identifier: Apache-2.0
// Means and selection as plain functions: what Python passes, in; an error sentence, out. Each has
// a form that launches its kernel on a GPU and one that runs the same source on a CPU.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "launch/fine.h"

namespace vsa::launch {

using MeanDtypes = Values<Dtype::Bf16, Dtype::Fp16, Dtype::Fp32>;

struct MeanTensor {
  TokenView tokens;  // text included
  Grid grid;
  const int* sizes;  // [tiles] of padded tiles the real tokens, null for a video
  int heads;
  float* means;  // [batch, heads, tiles, head_dim]
};

struct TileMeans {
  std::vector<MeanTensor> tensors;  // up to three
  int batch, head_dim;
  Dtype dtype;
};

struct SelectTiles {
  const float* scores;   // [rows, columns]
  const uint32_t* must;  // [query_tiles, words] tiles that are always kept, null without
  uint32_t* bitmap;      // [rows, words]
  float* weights;        // [rows, columns] softmax of the scores, null without; may be `scores`
  int first_row;         // number of the first row among all, [batch, heads, query_tiles]
  int rows, columns, query_tiles;
  std::vector<int> counts;  // least tiles of a row, one for all or one per head
  double mass;              // least share of the softmax, 0 for none
  // Where columns are slots of a ring: equal scores go in the order of time.
  const int64_t* oldest;  // [1] the slot of the ring's oldest chunk; null: columns are in order
  int ring, per_slot;     // column that the ring begins at, columns of a slot
};

struct SoftmaxRows {
  float* scores;  // [rows, columns], of which the softmax takes the place
  int rows, columns;
};

constexpr int kMostHeadBudgets = 256;  // heads that may have counts of their own

// Empty when all went well.
std::string tile_means(const TileMeans& call, int device, void* stream);
std::string tile_means_emulated(const TileMeans& call);
std::string select_tiles(const SelectTiles& call, int device, void* stream);
std::string select_tiles_emulated(const SelectTiles& call);
std::string softmax_rows(const SoftmaxRows& call, int device, void* stream);
std::string softmax_rows_emulated(const SoftmaxRows& call);

}  // namespace vsa::launch
