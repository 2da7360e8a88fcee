// SPDX-License-Identifier: Apache-2.0
// What padded tiles need besides, as plain functions: what Python passes, in; an error sentence,
// out.
#pragma once
#include <cstdint>
#include <string>

namespace vsa::launch {

// What callers keep, as a bitmap of tiles of 64 slots.
struct KeptTiles {
  // One of these, the others are null.
  const int* lists;       // [rows, width] key tiles
  const uint8_t* map;     // [rows, columns] 0 or 1
  const uint32_t* words;  // [rows, words(columns)], which may be `bitmap`

  const int* counts;    // [rows] how many of a list are read; null without lists
  const int* sizes;     // [query_tiles] real tokens of the caller's tiles; null: all slots are
  const int* kv_sizes;  // [columns]
  uint32_t* bitmap;     // [rows * parts, words(columns * parts)]
  int* lengths;         // [rows * parts] bits of each row, null for none
  int* part_sizes;      // [columns * parts] real tokens of our tiles of the keys, null for none
  int rows;             // of [batch, heads, query_tiles]
  int query_tiles, columns, width;
  int parts;  // tiles of ours in one of the caller's
};

// Scores of key tiles without a token, which nobody may choose.
struct HideEmpty {
  float* scores;        // [rows, columns]
  const int* kv_sizes;  // [columns]
  int rows, columns;
};

// Empty when all went well.
std::string keep_tiles(const KeptTiles& call, int device, void* stream);
std::string keep_tiles_emulated(const KeptTiles& call);
std::string hide_empty(const HideEmpty& call, int device, void* stream);
std::string hide_empty_emulated(const HideEmpty& call);

}  // namespace vsa::launch
