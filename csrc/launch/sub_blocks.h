// SPDX-License-Identifier: Apache-2.0
// Means of runs and the scores of tiles by them as plain functions: what Python passes, in; an
// error sentence, out.
#pragma once
#include <string>
#include <vector>

#include "launch/fine.h"

namespace vsa::launch {

using RunSlots = Values<4, 8, 16>;  // of a tile, that kernels are compiled for

struct RunTensor {
  TokenView tokens;  // text included
  Grid grid;
  int heads;
  float* means;         // [batch, heads, tiles, head_dim], null without
  unsigned char* rows;  // of runs as kernels/coarse/run_layout.h shows them, null without
  float* factors;       // of these
  bool are_keys;
};

struct RunMeans {
  std::vector<RunTensor> tensors;  // up to three
  int batch, head_dim, runs, slots;
  Dtype dtype;
};

// Query heads that share a key head are rows of one matrix, of batch * kv_heads matrices.
struct SubBlockScores {
  const unsigned char* queries;
  const float* query_factors;
  const unsigned char* keys;
  const float* key_factors;
  float* scores;                // [matrices, rows, columns]
  int matrices, rows, columns;  // rows and columns are tiles
  int head_dim, slots;
  bool has_empty;  // whether slots may be empty
  float scale;     // not zero
};

// Empty when all went well.
std::string run_means(const RunMeans& call, int device, void* stream);
std::string run_means_emulated(const RunMeans& call);
std::string sub_block_scores(const SubBlockScores& call, int device, void* stream);
std::string sub_block_scores_emulated(const SubBlockScores& call, int blocks, unsigned seed);

}  // namespace vsa::launch
