// SPDX-License-Identifier: Apache-2.0
// What callers of the drop-ins keep, as the bitmap of the fine stage and the length of its rows:
// from lists of key tiles, a map, or a bitmap. One warp per row of the caller's.
//
// A caller's tile has 64 slots, or several times as many: so many `parts` of 64 follow each other,
// which share its row and its column. What holds no token is left out: it has nothing to give and
// nothing to ask.
//
// Lists become words in registers: lane l gathers the columns from 32 l on, and each entry is shown
// to all lanes. So neither the order of a list matters, nor an entry that comes twice.
#pragma once
#include "prim/warp.h"
#include "tile/tile.h"

namespace vsa {

struct KeptTilesParams {
  // What rows keep is one of these three, the others are null.
  const int* lists;       // [rows, width] key tiles, of which `counts` says how many are read
  const uint8_t* map;     // [rows, columns] 0 or 1
  const uint32_t* words;  // [rows, words(columns)], which may be `bitmap`

  const int* counts;    // [rows], with lists
  const int* sizes;     // [query_tiles] real tokens of the caller's tiles; null: all slots are
  const int* kv_sizes;  // [columns]
  uint32_t* bitmap;     // [rows * parts, words(columns * parts)]
  int* lengths;         // [rows * parts] bits of each row, null for none
  int* part_sizes;      // [columns * parts] real tokens of the keys' parts, null for none
  int rows, query_tiles, columns, width, parts;

  VSA_DEVICE int slots() const { return parts * kTileRows; }
};

class KeptTiles {
 public:
  static constexpr int kMostParts = 4;

  // row: of [batch, heads, query_tiles]
  VSA_DEVICE static void run(const KeptTilesParams& p, int row) {
    KeptTiles kept(p, row);
    if (row == 0) kept.look_at_sizes();
    for (int word = 0; word < bitmap::words(p.columns); ++word) {
      if (p.lists != nullptr && word % kWarpThreads == 0) kept.gather(word * kWordBits);
      const uint32_t bits = kept.of_caller(word);
      for (int part = 0; part < p.parts; ++part) kept.write(word, bits, part);
    }
    if (p.lengths != nullptr) kept.write_lengths();
  }

 private:
  VSA_DEVICE KeptTiles(const KeptTilesParams& p, int row)
      : p_(p),
        row_(row),
        size_(p.sizes != nullptr ? size_of(p.sizes, row % p.query_tiles) : p.slots()),
        length_(0) {}

  VSA_DEVICE int size_of(const int* sizes, int tile) const {
    const int size = load_global(sizes + tile);
    stop_unless(size >= 0 && size <= p_.slots());
    return size;
  }
  // Of a tile with so many tokens.
  VSA_DEVICE static int in_part(int size, int part) {
    const int left = size - part * kTileRows;
    return left < 0 ? 0 : left > kTileRows ? kTileRows : left;
  }

  // All of the keys.
  VSA_DEVICE void look_at_sizes() const {
    each_lane([&](int lane) {
      for (int column = lane; column < p_.columns; column += kWarpThreads) {
        const int size = size_of(p_.kv_sizes, column);
        if (p_.part_sizes == nullptr) continue;
        for (int part = 0; part < p_.parts; ++part)
          p_.part_sizes[column * p_.parts + part] = in_part(size, part);
      }
    });
  }

  // The row's list, as far as it is of columns from `first` on: a word of them in each lane.
  VSA_DEVICE void gather(int first) {
    each_lane([&](int lane) { gathered_[lane] = 0; });
    const int count = load_global(p_.counts + row_);
    stop_unless(count >= 0 && count <= p_.width);
    const int* list = p_.lists + int64_t{row_} * p_.width;
    for (int from = 0; from < count; from += kWarpThreads) {
      const int here = count - from < kWarpThreads ? count - from : kWarpThreads;
      PerLane<int> entry;
      each_lane([&](int lane) {
        entry[lane] = load_global(list + from + (lane < here ? lane : 0));
        stop_unless(entry[lane] >= 0 && entry[lane] < p_.columns);
      });
      for (int i = 0; i < here; ++i) {
        const int column = broadcast(entry, i) - first;
        if (column < 0) continue;
        each_lane([&](int lane) {
          if (column / kWordBits == lane) gathered_[lane] |= 1u << column % kWordBits;
        });
      }
    }
  }

  // A word of what the caller keeps.
  VSA_DEVICE uint32_t of_caller(int word) {
    if (p_.lists != nullptr) return broadcast(gathered_, word % kWarpThreads);
    if (p_.map == nullptr) return p_.words[int64_t{row_} * bitmap::words(p_.columns) + word];
    return ballot([&](int lane) {
      const int column = word * kWordBits + lane;
      return column < p_.columns && load_global(p_.map + int64_t{row_} * p_.columns + column) != 0;
    });
  }

  // The tiles of ours of a word's columns fill as many words as a tile has parts; this is one.
  VSA_DEVICE void write(int of_word, uint32_t kept, int which) {
    const int word = of_word * p_.parts + which, words = bitmap::words(p_.columns * p_.parts);
    if (word >= words) return;
    const uint32_t bits = ballot([&](int lane) {
      const int tile = word * kWordBits + lane, column = tile / p_.parts;
      return column < p_.columns && (kept >> column % kWordBits & 1) != 0 &&
             load_global(p_.kv_sizes + column) > tile % p_.parts * kTileRows;
    });
    each_lane([&](int lane) {
      if (lane < p_.parts)
        p_.bitmap[first_row(lane) * words + word] = in_part(size_, lane) > 0 ? bits : 0;
    });
    length_ += popcount(bits);
  }
  VSA_DEVICE int64_t first_row(int part) const { return int64_t{row_} * p_.parts + part; }

  VSA_DEVICE void write_lengths() const {
    each_lane([&](int lane) {
      if (lane < p_.parts) p_.lengths[first_row(lane)] = in_part(size_, lane) > 0 ? length_ : 0;
    });
  }

  const KeptTilesParams& p_;
  const int row_, size_;
  int length_;  // bits of the row so far
  PerLane<uint32_t> gathered_;
};

struct HideEmptyParams {
  float* scores;        // [rows, columns] products of tile means
  const int* kv_sizes;  // [columns] real tokens of the key tiles
  int rows, columns;
};

// Key tiles without a token take no part in a choice or a softmax: their scores become less than
// any other. One warp per row.
struct HideEmpty {
  static constexpr float kEmptyScore = -1e30f;  // finite: less by itself it is NaN

  VSA_DEVICE static void run(const HideEmptyParams& p, int row) {
    float* scores = p.scores + int64_t{row} * p.columns;
    each_lane([&](int lane) {
      for (int column = lane; column < p.columns; column += kWarpThreads) {
        const int size = load_global(p.kv_sizes + column);
        stop_unless(size >= 0 && size <= kTileRows);
        if (size == 0) scores[column] = kEmptyScore;
      }
    });
  }
};

}  // namespace vsa
