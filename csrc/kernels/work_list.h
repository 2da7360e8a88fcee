// SPDX-License-Identifier: Apache-2.0
// Which work there is, in which order, and how blocks come by it.
#pragma once
#include "kernels/params.h"
#include "prim/warp.h"

namespace vsa {

// One work item: neighbouring tiles of one head, one for each consumer of a block.
struct Work {
  int batch, head, first_place, axis;
};

// Tiles in the order of work: the text's come first, because they attend everything. -1 past the
// last one.
VSA_DEVICE int tile_at(const TiledSequence& sequence, int place, int axis) {
  if (place >= sequence.num_tiles()) return -1;
  const Grid& grid = sequence.grid;
  if (place < sequence.text_tiles) return grid.num_tiles() + place;
  return tile_in_turn(place - sequence.text_tiles, axis, grid.tiles.t, grid.layer.by);
}

// Items of a sequence whose tiles go in groups to the blocks. Those of all heads' text come first,
// since they take several times as long and nothing else could fill the end. After them heads are
// outermost, so that all blocks read one head's tiles at a time.
struct WorkList {
  int groups, text_groups, heads, items;
  const int* axes;  // [batch, heads]

  VSA_DEVICE WorkList(const TiledSequence& sequence,
                      int consumers,
                      int batch,
                      int heads,
                      const int* axes)
      : groups(ceil_div(sequence.num_tiles(), consumers)),
        text_groups(ceil_div(sequence.text_tiles, consumers)),
        heads(heads),
        items(batch * heads * groups),
        axes(axes) {}

  VSA_DEVICE Work work(int item, int consumers) const {
    const int text_items = items / groups * text_groups;
    const bool text = item < text_items;
    const int of_head = text ? text_groups : groups - text_groups;
    const int place = text ? item : item - text_items;
    const int head = place / of_head, group = place % of_head + (text ? 0 : text_groups);
    return {head / heads, head % heads, group * consumers, load_global(axes + head)};
  }

  // A warp's share of the items, which differ in length: blocks take one as they get done.
  // tickets: 0 at the start of a launch
  template <class Fn>
  VSA_DEVICE void take_each(int* tickets, int consumers, Fn fn) const {
    const auto take = [&] { return first_lane([&] { return take_ticket(tickets); }); };
    for (int item = take(); item < items; item = take()) fn(work(item, consumers));
  }
};

}  // namespace vsa
