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

// All work tiles of a sequence. Text comes first, of all heads: it takes several times as long, and
// would leave blocks idle at the end. After it heads are outermost, so that all blocks read the
// tiles of one head at a time.
struct WorkList {
  int groups, text_groups, heads, size;
  const int* axes;  // [batch, heads]

  VSA_DEVICE WorkList(const TiledSequence& sequence,
                      int consumers,
                      int batch,
                      int heads,
                      const int* axes)
      : groups(ceil_div(sequence.num_tiles(), consumers)),
        text_groups(ceil_div(sequence.text_tiles, consumers)),
        heads(heads),
        size(batch * heads * groups),
        axes(axes) {}

  VSA_DEVICE WorkTile work_tile(int index, int consumers) const {
    const int text_size = size / groups * text_groups;
    const bool text = index < text_size;
    const int of_head = text ? text_groups : groups - text_groups;
    const int place = text ? index : index - text_size;
    const int head = place / of_head, group = place % of_head + (text ? 0 : text_groups);
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
