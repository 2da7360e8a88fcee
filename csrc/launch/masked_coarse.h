// SPDX-License-Identifier: Apache-2.0
// Means, selection and products under a mask over tiles as plain functions: what Python passes, in;
// an error sentence, out. They are the calls without a mask, and the mask.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "launch/coarse_select.h"
#include "launch/float_product.h"

namespace vsa::launch {

// Query tiles see key tiles by a rule, or by a bitmap for each head or for all.
struct MaskOfTiles {
  std::vector<int> rule;    // numbers of vsa/values/tile_mask.py, none beside a bitmap
  const uint32_t* allowed;  // [mask_heads, query_tiles, words], null for a rule
  int mask_heads;
};

struct MaskedTileMeans : TileMeans {
  std::vector<int> rule;
  int first_of_keys;  // tensors from this one on are of keys
};

struct MaskedSelectTiles : SelectTiles {
  MaskOfTiles mask;
  std::vector<double> shares;  // like counts: of what a row may choose, 0 where counts hold
};

struct MaskedSoftmaxRows : SoftmaxRows {
  MaskOfTiles mask;
  int first_row, query_tiles;  // the number of the first row among [batch, heads, query_tiles]
};

// Of each product, what its sides stand for.
constexpr int kRowsAndColumns = 0, kRowsAndDepth = 1, kDepthAndRows = 2;  // queries and keys

struct MaskedProducts : Products {
  std::vector<int> rule;
  int first_query;  // row of all that the queries begin at
  std::vector<int> sides;
};

struct MaskedScoreGradient : ScoreGradient {
  std::vector<int> rule;
  int first_query;
};

// Empty when all went well.
std::string masked_tile_means(const MaskedTileMeans& call, int device, void* stream);
std::string masked_tile_means_emulated(const MaskedTileMeans& call);
std::string masked_select_tiles(const MaskedSelectTiles& call, int device, void* stream);
std::string masked_select_tiles_emulated(const MaskedSelectTiles& call);
std::string masked_softmax_rows(const MaskedSoftmaxRows& call, int device, void* stream);
std::string masked_softmax_rows_emulated(const MaskedSoftmaxRows& call);
std::string masked_multiply(const MaskedProducts& call, int device, void* stream);
std::string masked_multiply_emulated(const MaskedProducts& call, int blocks, unsigned seed);
std::string masked_score_gradient(const MaskedScoreGradient& call, int device, void* stream);
std::string masked_score_gradient_emulated(const MaskedScoreGradient& call,
                                           int blocks,
                                           unsigned seed);

}  // namespace vsa::launch
