// SPDX-License-Identifier: Apache-2.0
// What a video that comes chunk by chunk needs besides, as plain functions: what Python passes, in;
// an error sentence, out.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "launch/coarse_select.h"

namespace vsa::launch {

// Means of the tiles of a chunk, whose keys and values go into a cache.
struct ChunkMeans {
  MeanTensor k, v;                  // means: those of the first slot
  std::vector<MeanTensor> queries;  // one, or none whose means nobody wants
  TokenView k_slots, v_slots;       // the first token of the first slot
  TokenView k_text, v_text;         // the first token of the text; null where none comes along
  const int64_t* slot;              // [1] that is filled; null: the first
  int slots;                        // that the cache has
  int batch, head_dim;
  Dtype dtype;
};

// Chunks of columns in another order.
struct ReorderBitmap {
  const uint32_t* source;  // [rows, words]
  uint32_t* target;        // the same
  const int64_t* order;    // [columns / per_chunk] of each chunk of the target that of the source
  int rows, columns, per_chunk;
};

// Empty when all went well.
std::string chunk_means(const ChunkMeans& call, int device, void* stream);
std::string chunk_means_emulated(const ChunkMeans& call);
std::string reorder_bitmap(const ReorderBitmap& call, int device, void* stream);
std::string reorder_bitmap_emulated(const ReorderBitmap& call);

}  // namespace vsa::launch
