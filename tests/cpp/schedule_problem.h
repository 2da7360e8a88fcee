// SPDX-License-Identifier: Apache-2.0
// A random selection and work tiles of it, for the tile scheduler.
#pragma once
#include <random>
#include <vector>

#include "kernels/schedule/tile_scheduler.h"

namespace vsa::test {
namespace {

constexpr int kBatch = 2, kKeyHeads = 2;
constexpr Axes kTile = {3, 5, 4};

struct Item {
  WorkTile work;
  int head;  // the first of those that share a key head
};

struct Problem {
  std::mt19937 rng;
  const int sharing;
  std::vector<uint64_t> text_of_rows, text_of_columns;
  TiledSequence rows, columns;
  TokenTensor first{}, second{};
  std::vector<uint32_t> selected;  // [batch, heads, tiles of the rows' video, words]
  std::vector<int> axes;           // [batch, key heads]
  std::vector<Item> items;

  // many: columns that do not fit into one word for each lane
  Problem(unsigned seed, int consumers, bool many)
      : rng(seed),
        sharing(1 + below(3)),
        rows(sequence(1 + below(5), text_of_rows)),
        columns(sequence(many ? 1100 : 1 + below(seed % 2 != 0 ? 5 : 90), text_of_columns)) {
    first.video = {{}, 1 + below(200), 1 + below(9), 1 + below(9)};
    second.video = {{}, 1 + below(200), 1 + below(9), 1 + below(9)};
    select();
    for (int i = 0; i < kBatch * kKeyHeads; ++i) axes.push_back(below(4));
    const WorkList list(rows, consumers, kBatch, kKeyHeads, axes.data());
    for (int i = 0; i < (many ? 2 : 6); ++i) {
      const WorkTile work = list.work_tile(below(list.size), consumers);
      items.push_back({work, work.head * sharing});
    }
  }

  int below(int end) { return static_cast<int>(rng() % static_cast<unsigned>(end)); }
  int heads() const { return kKeyHeads * sharing; }
  int words() const { return bitmap::words(columns.grid.num_tiles()); }
  const uint32_t* bitmaps(const Item& item, int h = 0) const {
    return bitmap_of(selected.data(), item.work.batch, heads(), item.head + h,
                     rows.grid.num_tiles(), words());
  }

  // Up to four lines of tiles, often clipped, with text around them or not.
  TiledSequence sequence(int tiles, std::vector<uint64_t>& text_rows) {
    const Axes video = {1 + below(6), 1 + below(10), 4 * tiles - below(4)};
    const int prefix = below(2) * (1 + below(200)), suffix = below(2) * (1 + below(200));
    const int text = ceil_div(prefix, kTileRows) + ceil_div(suffix, kTileRows);
    for (int i = 0; i < kBatch * text; ++i)
      text_rows.push_back(below(3) == 0 ? 0 : uint64_t{rng()} << 32 | rng() | 1);
    return {make_grid(video, kTile, prefix, suffix), text, text_rows.data()};
  }

  // Rows that want nothing, few tiles, every other one, or all; often as many as their neighbours.
  void select() {
    const int count = kBatch * heads() * rows.grid.num_tiles();
    selected.resize(static_cast<size_t>(count) * words());
    int eighths = 0;
    for (int row = 0; row < count; ++row) {
      if (below(2) == 0) eighths = std::vector<int>{0, 1, 4, 8}[below(4)];
      for (int tile = 0; tile < columns.grid.num_tiles(); ++tile)
        if (below(8) < eighths) bitmap::set(&selected[static_cast<size_t>(row) * words()], tile);
    }
  }

  // Which rows of the work tile selected a tile, for the h-th of its heads.
  uint32_t owners(const Item& item, int h, int tile, int consumers) const {
    uint32_t found = 0;
    for (int r = 0; r < consumers; ++r) {
      const int row = tile_at(rows, item.work.first_place + r, item.work.axis);
      if (row < 0) continue;
      const bool wants =
          columns.is_text(tile)
              ? columns.rows(columns.place(tile), item.work.batch) != 0
              : rows.is_text(row) || bitmap::test(bitmaps(item, h) + row * words(), tile);
      if (wants) found |= 1u << r;
    }
    return found;
  }
};

}  // namespace
}  // namespace vsa::test
