// SPDX-License-Identifier: Apache-2.0
// Facts: what the host, the kernels and the tests must agree on. Constexpr functions, nothing else.
//
// A video of (T, H, W) tokens is cut into tiles of at most 64. No token moves: a tile is an address
// pattern. One layer of a video that is 3 tokens high and 7 wide, cut into tiles of (2, 2, 4):
//
//     w  0 1 2 3   4 5 6
//   h 0 [ tile 0 ][ tile 1        rows of tile 1:   0  1  2  -    t 0, h 0
//     1 [        ][                                 4  5  6  -         h 1
//     2 [ tile 2 ][ tile 3                          8  9 10  -    t 1, h 0
//                                                  12 13 14  -         h 1
//
// Rows number the whole box, so a clipped tile has gaps where the video ends: a row means the same
// offset in every tile, and a 64-bit mask says which rows are tokens.
//
// Which tile attends which is a bitmap: rows of 32-bit words, least significant bit first.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define VSA_HD __host__ __device__ constexpr
#else
#define VSA_HD constexpr
#endif

namespace vsa {

constexpr int kTileRows = 64;  // rows that every tile occupies on chip, whatever its volume
constexpr int kWordBits = 32;  // tiles per bitmap word

struct Axes {  // one number per video axis
  int t, h, w;

  VSA_HD int volume() const { return t * h * w; }
  constexpr bool operator==(const Axes&) const = default;
};

VSA_HD int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Division by a number known beforehand, as one multiplication: 0 <= n and n * by < 2^40.
struct Divisor {
  int by;
  uint64_t reciprocal;  // 2^40 / by, rounded up

  VSA_HD int quotient(int n) const {
    return static_cast<int>(static_cast<uint64_t>(n) * reciprocal >> 40);
  }
};

VSA_HD Divisor divisor(int by) {
  return {by, ((uint64_t{1} << 40) + static_cast<uint64_t>(by) - 1) / static_cast<uint64_t>(by)};
}

VSA_HD int popcount(uint32_t word) { return __builtin_popcount(word); }
VSA_HD int popcount(uint64_t word) { return __builtin_popcountll(word); }

// Offset (tokens) of a tile's row from the tile's first token.
VSA_HD Axes row_offset(Axes tile, int row) {
  return {row / (tile.h * tile.w), row / tile.w % tile.h, row % tile.w};
}

// n / by for n and by up to 64, as one multiplication; the reciprocal can be kept.
VSA_HD int small_reciprocal(int by) { return 65536 / by + 1; }
VSA_HD int small_quotient(int n, int reciprocal) { return n * reciprocal >> 16; }

// Bit r is set when row r of a tile lies among the first `kept` tokens along each axis.
VSA_HD uint64_t rows_within(Axes tile, Axes kept) {
  uint64_t rows = 0;
  for (int row = 0; row < tile.volume(); ++row) {
    const Axes at = row_offset(tile, row);
    if (at.t < kept.t && at.h < kept.h && at.w < kept.w) rows |= uint64_t{1} << row;
  }
  return rows;
}

// Only the last tile of an axis can be clipped, so a grid has at most eight kinds of tile.
enum Clip : unsigned { kWhole = 0, kClipT = 1, kClipH = 2, kClipW = 4, kClipKinds = 8 };

struct Place {    // where a tile lies
  Axes first;     // tokens: coordinates of row 0
  unsigned clip;  // Clip bits of the axes along which the video ends inside the tile
};

// A token sequence [prefix | T*H*W video tokens, w fastest | suffix] with its video cut into tiles.
struct Grid {
  Axes video;                             // tokens along each axis
  Axes tile;                              // tokens of a whole tile along each axis, volume <= 64
  Axes tiles;                             // tiles along each axis
  Divisor layer, line;                    // tiles of one t, tiles of one t and h
  int layer_reciprocal, line_reciprocal;  // of a tile's rows of one t, of one t and h
  int prefix, suffix;                     // text tokens before and after the video
  uint64_t rows[kClipKinds];  // [clip] rows that are tokens; 0 for kinds this grid does not have

  VSA_HD int num_tiles() const { return tiles.volume(); }
  VSA_HD int num_tokens() const { return prefix + video.volume() + suffix; }
  VSA_HD int suffix_begin() const { return prefix + video.volume(); }

  // Tiles are ordered like tokens: t slowest, w fastest. A tile's coordinates, in tiles.
  VSA_HD Axes in_tiles(int index) const {
    const int t = layer.quotient(index), in_layer = index - t * layer.by;
    const int h = line.quotient(in_layer), w = in_layer - h * line.by;
    return {t, h, w};
  }
  VSA_HD Place place(int index) const {
    const Axes at = in_tiles(index);
    const Axes first = {at.t * tile.t, at.h * tile.h, at.w * tile.w};
    return {first, (first.t + tile.t > video.t ? kClipT : 0u) |
                       (first.h + tile.h > video.h ? kClipH : 0u) |
                       (first.w + tile.w > video.w ? kClipW : 0u)};
  }

  VSA_HD uint64_t row_mask(int index) const { return rows[place(index).clip]; }

  // Position in the sequence of a tile's row, or -1 where that row is no token.
  VSA_HD int token(const Place& at, int row) const {
    if ((rows[at.clip] >> row & 1) == 0) return -1;
    // row_offset of the tile, without its divisions.
    const int layer = tile.h * tile.w;
    const int t = small_quotient(row, layer_reciprocal), in_layer = row - t * layer;
    const int h = small_quotient(in_layer, line_reciprocal), w = in_layer - h * tile.w;
    return prefix + ((at.first.t + t) * video.h + at.first.h + h) * video.w + at.first.w + w;
  }

  VSA_HD bool is_text(int token) const { return token < prefix || token >= suffix_begin(); }

  // Tile that holds a token, or -1 for text.
  VSA_HD int tile_of(int token) const {
    if (is_text(token)) return -1;
    const Axes at = row_offset(video, token - prefix);
    return (at.t / tile.t * tiles.h + at.h / tile.h) * tiles.w + at.w / tile.w;
  }

  // Row of a token inside its tile, or -1 for text.
  VSA_HD int row_of(int token) const {
    if (is_text(token)) return -1;
    const Axes at = row_offset(video, token - prefix);
    return (at.t % tile.t * tile.h + at.h % tile.h) * tile.w + at.w % tile.w;
  }
};

VSA_HD Grid make_grid(Axes video, Axes tile, int prefix = 0, int suffix = 0) {
  const Axes tiles = {ceil_div(video.t, tile.t), ceil_div(video.h, tile.h),
                      ceil_div(video.w, tile.w)};
  Grid grid = {video,
               tile,
               tiles,
               divisor(tiles.h * tiles.w),
               divisor(tiles.w),
               small_reciprocal(tile.h * tile.w),
               small_reciprocal(tile.w),
               prefix,
               suffix,
               {}};
  for (unsigned clip = kWhole; clip < kClipKinds; ++clip) {
    const Axes kept = {clip & kClipT ? video.t % tile.t : tile.t,
                       clip & kClipH ? video.h % tile.h : tile.h,
                       clip & kClipW ? video.w % tile.w : tile.w};
    grid.rows[clip] = rows_within(tile, kept);
  }
  return grid;
}

// Along which axis tiles that follow each other in the order of work are neighbours.
constexpr int kAlongW = 0, kAlongT = 1, kBackwards = 2;  // the last may be added to either

// The tile in a place of the order of work: along w as tiles are numbered; along t column by
// column in a serpentine, so that a column begins in the layer in which the one before it ends.
// Backwards the same from the end.
// axis: of these; layers: tiles along t; layer: tiles of one of them
VSA_HD int serpentine_tile(int place, int axis, int layers, int layer) {
  if ((axis & kBackwards) != 0) place = layers * layer - 1 - place;
  if ((axis & kAlongT) == 0) return place;
  const int column = place / layers, step = place - column * layers;
  const int t = column % 2 == 0 ? step : layers - 1 - step;
  return t * layer + column;
}

// A row of `bits` bits is words(bits) words; bit j is bit j % 32 of word j / 32; spare bits are 0.
namespace bitmap {

VSA_HD int words(int bits) { return ceil_div(bits, kWordBits); }

VSA_HD bool test(const uint32_t* row, int bit) {
  return (row[bit / kWordBits] >> bit % kWordBits & 1) != 0;
}

VSA_HD void set(uint32_t* row, int bit) { row[bit / kWordBits] |= 1u << bit % kWordBits; }

VSA_HD int count(const uint32_t* row, int bits) {
  int total = 0;
  for (int word = 0; word < words(bits); ++word) total += popcount(row[word]);
  return total;
}

// Index of the lowest set bit, 32 for an empty word. Counting the zeros below it needs no
// instruction that only one of the two compilers knows.
VSA_HD int lowest(uint32_t word) { return popcount(~word & (word - 1)); }
// That of the highest, -1 for an empty word.
VSA_HD int highest(uint32_t word) {
  for (int step = 1; step < kWordBits; step *= 2) word |= word >> step;
  return popcount(word) - 1;
}

// In place: bit c of block[r] trades places with bit r of block[c]. Five rounds swap the
// off-diagonal quarters of ever smaller squares: 16x16, 8x8, ... 1x1.
VSA_HD void transpose_block(uint32_t (&block)[kWordBits]) {
  uint32_t low = 0x0000ffff;
  for (int side = kWordBits / 2; side > 0; side /= 2, low ^= low << side) {
    for (int r = 0; r < kWordBits; r = (r + side + 1) & ~side) {
      const uint32_t swap = (block[r] >> side ^ block[r + side]) & low;
      block[r] ^= swap << side;
      block[r + side] ^= swap;
    }
  }
}

// in [rows][words(columns)] -> out [columns][words(rows)]
VSA_HD void transpose(const uint32_t* in, int rows, int columns, uint32_t* out) {
  for (int top = 0; top < rows; top += kWordBits) {
    for (int left = 0; left < columns; left += kWordBits) {
      uint32_t block[kWordBits] = {};
      for (int r = 0; r < kWordBits && top + r < rows; ++r)
        block[r] = in[(top + r) * words(columns) + left / kWordBits];
      transpose_block(block);
      for (int c = 0; c < kWordBits && left + c < columns; ++c)
        out[(left + c) * words(rows) + top / kWordBits] = block[c];
    }
  }
}

}  // namespace bitmap

// The rules above, on one grid that is clipped along t and h.
namespace facts {

constexpr Grid kGrid = make_grid({21, 30, 52}, {4, 4, 4}, 226, 7);
constexpr Place kLast = kGrid.place(kGrid.num_tiles() - 1);

static_assert(kGrid.tiles == Axes{6, 8, 13}, "an axis that is not a multiple gets one more tile");
static_assert(kGrid.rows[kWhole] == ~uint64_t{0}, "a whole tile of 64 tokens fills its 64 rows");
static_assert(kLast.clip == (kClipT | kClipH), "a tile is clipped only where the video ends in it");
static_assert(popcount(kGrid.rows[kLast.clip]) == 1 * 2 * 4, "a clipped tile keeps the remainder");
static_assert(kGrid.token(kLast, 0) == 226 + (20 * 30 + 28) * 52 + 48, "text shifts the video");
static_assert(kGrid.token(kLast, 63) == -1, "a row past the end of the video is no token");
static_assert(kGrid.tile_of(kGrid.token(kLast, 5)) == kGrid.num_tiles() - 1 &&
                  kGrid.row_of(kGrid.token(kLast, 5)) == 5,
              "a token finds its way back to its tile and row");
static_assert(kGrid.tile_of(225) == -1 && kGrid.tile_of(kGrid.suffix_begin()) == -1,
              "text belongs to no tile");
constexpr bool small_quotients_are_quotients() {
  for (int by = 1; by <= kTileRows; ++by)
    for (int n = 0; n <= kTileRows; ++n)
      if (small_quotient(n, small_reciprocal(by)) != n / by) return false;
  return true;
}
static_assert(small_quotients_are_quotients(), "a multiplication divides rows exactly");
constexpr bool serpentine_tiles_meet() {
  const Axes tiles = kGrid.tiles;
  for (int place = 0; place + 1 < tiles.volume(); ++place) {
    const Axes a = kGrid.in_tiles(serpentine_tile(place, kAlongT, tiles.t, kGrid.layer.by));
    const Axes b = kGrid.in_tiles(serpentine_tile(place + 1, kAlongT, tiles.t, kGrid.layer.by));
    const bool last = (place + 1) % tiles.t == 0;
    if (last ? a.t != b.t : (a.t - b.t) * (a.t - b.t) != 1 || a.h != b.h || a.w != b.w)
      return false;
  }
  return true;
}
constexpr bool backwards_is_the_same_from_the_end(int axis) {
  const Axes tiles = kGrid.tiles;
  const int layer = kGrid.layer.by, all = tiles.volume();
  for (int place = 0; place < all; ++place)
    if (serpentine_tile(place, axis | kBackwards, tiles.t, layer) !=
        serpentine_tile(all - 1 - place, axis, tiles.t, layer))
      return false;
  return true;
}
static_assert(backwards_is_the_same_from_the_end(kAlongW) &&
                  backwards_is_the_same_from_the_end(kAlongT),
              "the last tile of an order is the first one backwards");
static_assert(serpentine_tiles_meet(),
              "along t every step is to a neighbour, or stays in its layer");
static_assert(bitmap::lowest(0) == kWordBits && bitmap::lowest(0x80000000u) == 31,
              "an empty word has its lowest bit past the end");

}  // namespace facts

}  // namespace vsa
