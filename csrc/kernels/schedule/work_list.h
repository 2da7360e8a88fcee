// SPDX-License-Identifier: Apache-2.0
// The work tiles of a kernel, their order, and how blocks take them.
#pragma once
#include "kernels/schedule/sequence.h"
#include "prim/warp.h"

namespace vsa {

// A work tile: neighbouring tiles of one head, one for each consumer of a block.
struct WorkTile {
  int batch, head, first_place, axis;
};

// What a consumer is told about a work tile, so that it need not keep a work list in registers.
struct Assignment {
  static constexpr int kIdle = -1;      // this work tile has no tile for the consumer
  static constexpr int kFinished = -2;  // there is no more work

  int batch, head, tile;
};

// Tiles in the order of work: the text's come first, because they attend everything. -1 past the
// last one.
VSA_DEVICE int tile_at(const TiledSequence& sequence, int place, int axis) {
  if (place >= sequence.num_tiles()) return -1;
  const Grid& grid = sequence.grid;
  if (place < sequence.text_tiles) return grid.num_tiles() + place;
  return serpentine_tile(place - sequence.text_tiles, axis, grid.tiles.t, grid.layer.by);
}

// Groups of neighbouring tiles by what they take, the longest first.
struct GroupOrder {
  const int* groups = nullptr;     // [batch, heads, groups]; null: as they come, text first
  const int* long_ones = nullptr;  // [1] the first so many of each head take far longer than most
};

// All work tiles of a sequence. What takes several times as long comes first, of all heads, text
// with it: it would leave blocks idle at the end. After it heads are outermost, so that all blocks
// read the tiles of one head at a time.
struct WorkList {
  int groups, first_groups, heads, size;
  const int* axes;  // [batch, heads]
  const int* order;

  VSA_DEVICE WorkList(const TiledSequence& sequence,
                      int consumers,
                      int batch,
                      int heads,
                      const int* axes,
                      GroupOrder order = {})
      : groups(ceil_div(sequence.num_tiles(), consumers)),
        first_groups(order.long_ones != nullptr ? load_global(order.long_ones)
                                                : ceil_div(sequence.text_tiles, consumers)),
        heads(heads),
        size(batch * heads * groups),
        axes(axes),
        order(order.groups) {}

  VSA_DEVICE WorkTile work_tile(int index, int consumers) const {
    const int first_size = size / groups * first_groups;
    const bool first = index < first_size;
    const int of_head = first ? first_groups : groups - first_groups;
    const int place = first ? index : index - first_size;
    const int head = place / of_head;
    int group = place % of_head + (first ? 0 : first_groups);
    if (order != nullptr) group = load_global(order + head * groups + group);
    return {head / heads, head % heads, group * consumers, load_global(axes + head)};
  }

  // The work tiles of one block, taken by one of its warps. They differ in length, so a block takes
  // the next one when it has finished the last: a counter in global memory says which.
  // tile_counter: 0 at the start of a launch
  template <class Fn>
  VSA_DEVICE void take_each(int* tile_counter, int consumers, Fn fn) const {
    const auto take = [&] { return first_lane([&] { return take_tile(tile_counter); }); };
    for (int index = take(); index < size; index = take()) fn(work_tile(index, consumers));
  }
};

// The bitmap of one head. bitmap: [batch, heads, rows, words]
VSA_DEVICE const uint32_t* bitmap_of(const uint32_t* bitmap,
                                     int batch,
                                     int heads,
                                     int head,
                                     int rows,
                                     int words) {
  return bitmap + (int64_t{batch} * heads + head) * rows * words;
}

}  // namespace vsa
