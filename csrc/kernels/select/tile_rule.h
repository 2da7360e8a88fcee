// SPDX-License-Identifier: Apache-2.0
// Which key tiles a query tile may choose, from a few whole numbers: vsa/values/tile_mask.py has
// the same arithmetic, and what each number means.
//
// A layer is the tiles of one place along t. Tiles of a layer follow each other, so two runs of
// layers are two runs of columns: what a query tile may choose along t. Along h and w it may choose
// what is near.
#pragma once
#include "prim/warp.h"

namespace vsa {

struct Run {  // of layers or columns, maybe an empty one
  int first, after;

  VSA_HD bool has(int x) const { return x >= first && x < after; }
  // The same by one comparison, for runs that do not end before they begin.
  VSA_HD bool holds(int x) const {
    return static_cast<unsigned>(x - first) < static_cast<unsigned>(after - first);
  }
  VSA_HD int length() const { return after > first ? after - first : 0; }
  VSA_HD bool meets(Run other) const {
    return first < other.after && other.first < after && first < after && other.first < other.after;
  }
};

struct TileRule {
  static constexpr int kNumbers = 12;
  static constexpr int kNoLimit = -1;

  int query_layers, key_layers, height, width;
  int offset;                // layer of the keys at which the queries begin
  int chunk, window, sinks;  // layers of a chunk, 0 without; chunks seen, 0 for all; first chunks
  int clean;                 // layers of the clean video before the noisy one, 0 for a single one
  int reach_t, reach_h, reach_w;
  Divisor layer, line;  // tiles of a layer, of a line of it

  VSA_HD int num_query_tiles() const { return query_layers * layer.by; }
  VSA_HD int num_key_tiles() const { return key_layers * layer.by; }

  // Two runs of layers that queries of a layer, counted by those of the keys, may choose.
  VSA_DEVICE void spans(int at, Run& one, Run& other) const {
    one = {0, 0};
    other = {0, key_layers};
    if (reach_t != kNoLimit) {
      other = {most(at - reach_t, 0), least(at + reach_t + 1, key_layers)};
    } else if (clean > 0) {
      const bool noisy = at >= clean;
      const int place = noisy ? at - clean : at, own = place / chunk * chunk;
      const int after = least(own + chunk, clean);
      one = {0, noisy ? own : after};
      other = {noisy ? clean + own : 0, noisy ? clean + after : 0};
    } else if (chunk > 0) {
      const int own = at / chunk * chunk;
      other = {window > 0 ? most(own - (window - 1) * chunk, 0) : 0,
               least(own + chunk, key_layers)};
      one = {0, least(sinks * chunk, other.first)};
    }
  }

  // Whether some query may choose tiles of a layer of the keys.
  VSA_DEVICE bool sees(int at) const {
    if (reach_t != kNoLimit) return at + reach_t >= offset && at - reach_t < offset + query_layers;
    if (chunk == 0 || clean > 0) return true;
    const int own = at / chunk, first = offset / chunk;
    const int last = (offset + query_layers - 1) / chunk, from = most(own, first);
    return from <= last && (window == 0 || from - own < window || own < sinks);
  }

  // Whether some query tile of a run may choose some key tile of another, or so it seems by their
  // layers alone. A run of queries that ends past the last tile goes on at the first.
  VSA_DEVICE bool meets(Run queries, Run keys) const {
    const int tiles = num_query_tiles();
    if (queries.length() >= tiles) return meets_in_order({0, tiles}, keys);
    const int first = queries.first % tiles, after = first + queries.length();
    if (after <= tiles) return meets_in_order({first, after}, keys);
    return meets_in_order({first, tiles}, keys) || meets_in_order({0, after - tiles}, keys);
  }

 private:
  VSA_HD static int most(int a, int b) { return a > b ? a : b; }
  VSA_HD static int least(int a, int b) { return a < b ? a : b; }

  VSA_DEVICE bool meets_in_order(Run queries, Run keys) const {
    const Run layers = {layer.quotient(keys.first), layer.quotient(keys.after - 1) + 1};
    const int last = layer.quotient(queries.after - 1);
    for (int at = layer.quotient(queries.first); at <= last; ++at) {
      Run one, other;
      spans(at + offset, one, other);
      if (one.meets(layers) || other.meets(layers)) return true;
    }
    return false;
  }
};

VSA_HD TileRule make_rule(const int (&n)[TileRule::kNumbers]) {
  return {n[0],
          n[1],
          n[2],
          n[3],
          n[4],
          n[5],
          n[6],
          n[7],
          n[8],
          n[9],
          n[10],
          n[11],
          divisor(n[2] * n[3]),
          divisor(n[3])};
}

// A rule, or a bitmap for each head or for all of them.
struct TileMask {
  TileRule rule;            // where there is no bitmap
  const uint32_t* allowed;  // [heads, query_tiles, words]
  int heads, query_tiles, columns;

  // Whether what a row may choose is two runs of columns.
  VSA_HD bool has_runs() const {
    return allowed == nullptr && rule.reach_h == TileRule::kNoLimit &&
           rule.reach_w == TileRule::kNoLimit;
  }
};

// The columns that one query tile may choose under a rule without reach along h and w: two runs,
// which is all that a row need look at.
class AllowedRuns {
 public:
  // row: counts query tiles and then heads.
  VSA_DEVICE AllowedRuns(const TileMask& mask, int row) : columns_(mask.columns) {
    const TileRule& rule = mask.rule;
    const int plane = rule.layer.by, tile = row % mask.query_tiles;
    rule.spans(rule.layer.quotient(tile) + rule.offset, one_, other_);
    one_ = {one_.first * plane, one_.after * plane};
    other_ = {other_.first * plane, other_.after * plane};
    if (other_.length() == 0) other_ = {one_.after, one_.after};
  }

  // How many columns may be chosen.
  VSA_DEVICE int count() const { return one_.length() + other_.length(); }
  // For any column, also past the last one.
  VSA_DEVICE bool has(int column) const { return one_.holds(column) || other_.holds(column); }
  VSA_DEVICE static bool has_in_run(int) { return true; }

  // fn(run) for each run of columns outside of which nothing may be chosen.
  template <class Fn>
  VSA_DEVICE void each_run(Fn fn) const {
    for (int i = one_.length() > 0 ? 0 : 1; i < 2; ++i) fn(i == 0 ? one_ : other_);
  }
  // fn(run) for what lies outside of these.
  template <class Fn>
  VSA_DEVICE void each_gap(Fn fn) const {
    for (int i = 0; i < 2; ++i)
      fn(i == 0 ? Run{one_.after, other_.first} : Run{other_.after, columns_});
  }

 private:
  int columns_;
  Run one_, other_;  // the first begins at column 0, the second where that ends or later
};

// What one query tile of one head may choose under any rule, or by a bitmap.
class AllowedTiles {
 public:
  VSA_DEVICE AllowedTiles(const TileMask& mask, int row)
      : rule_(mask.rule), columns_(mask.columns) {
    const int tile = row % mask.query_tiles;
    if (mask.allowed != nullptr) {
      const int head = row / mask.query_tiles % mask.heads;
      const int words = bitmap::words(mask.columns);
      words_ = mask.allowed + (int64_t{head} * mask.query_tiles + tile) * words;
      return;
    }
    const int plane = rule_.layer.by, at = rule_.layer.quotient(tile), in_layer = tile - at * plane;
    rule_.spans(at + rule_.offset, one_, other_);
    one_ = {one_.first * plane, one_.after * plane};
    other_ = {other_.first * plane, other_.after * plane};
    line_ = rule_.line.quotient(in_layer);
    place_ = in_layer - line_ * rule_.width;
  }

  VSA_DEVICE int count() const {
    return sum([&](int lane) {
      int own = 0;
      for (int column = lane; column < columns_; column += kWarpThreads)
        own += has_in_run(column) ? 1 : 0;
      return own;
    });
  }
  VSA_DEVICE bool has(int column) const { return column < columns_ && has_in_run(column); }
  // For a column that there is.
  VSA_DEVICE bool has_in_run(int column) const {
    if (words_ != nullptr)
      return (load_global(words_ + column / kWordBits) >> column % kWordBits & 1) != 0;
    if (!one_.has(column) && !other_.has(column)) return false;
    if (rule_.reach_h == TileRule::kNoLimit && rule_.reach_w == TileRule::kNoLimit) return true;
    const int in_layer = column - rule_.layer.quotient(column) * rule_.layer.by;
    const int line = rule_.line.quotient(in_layer), place = in_layer - line * rule_.width;
    return near(line, line_, rule_.reach_h) && near(place, place_, rule_.reach_w);
  }

  template <class Fn>
  VSA_DEVICE void each_run(Fn fn) const {
    fn(Run{0, columns_});
  }
  template <class Fn>
  VSA_DEVICE static void each_gap(Fn) {}

 private:
  VSA_DEVICE static bool near(int a, int b, int reach) {
    return reach == TileRule::kNoLimit || (a - b <= reach && b - a <= reach);
  }

  const TileRule& rule_;
  const int columns_;
  const uint32_t* words_ = nullptr;
  Run one_ = {0, 0}, other_ = {0, 0};
  int line_ = 0, place_ = 0;  // along h and w
};

}  // namespace vsa
