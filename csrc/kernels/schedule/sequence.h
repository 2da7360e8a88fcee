// SPDX-License-Identifier: Apache-2.0
// Where tensors of tokens lie, and how a sequence is cut into tiles. Plain values that travel as
// kernel parameters.
#pragma once
#include "tile/tile.h"

namespace vsa {

// Tokens of one tensor as boxes of tokens by 64 channels. Either the heads lie inside a token and
// move the channel, or they lie outside and move the outermost axis.
struct MappedTokens {
  TensorMap map;
  int channels_per_head;  // elements from head to head along the channel axis, 0 if outside
  int outer_per_head;     // steps of the outermost axis from head to head, 0 if inside
  int outer_per_batch;    // steps of the outermost axis from batch element to batch element
};

// q, k, v or out. The video has a map of five axes; text stands before and after it and has maps of
// its own, with tokens along w.
struct TokenTensor {
  MappedTokens video, prefix, suffix;
};

enum class Region { Video, Prefix, Suffix };

// Where a tile lies, worked out once for all that asks.
struct TilePlace {
  Region region;
  int text;       // index among the text's tiles, negative for the video's
  Axes first;     // tokens: coordinates of row 0 in its region, text along w
  unsigned clip;  // Clip bits
};

// A grid with its text cut into tiles too, runs of 64 tokens: first the video's tiles, then the
// prefix's, then the suffix's.
struct TiledSequence {
  Grid grid;
  int text_tiles;             // of prefix and suffix together
  const uint64_t* text_rows;  // [batch, text_tiles] rows that are real tokens; null without text

  VSA_HD int num_tiles() const { return grid.num_tiles() + text_tiles; }
  VSA_DEVICE int prefix_tiles() const { return ceil_div(grid.prefix, kTileRows); }
  VSA_DEVICE bool is_text(int tile) const { return tile >= grid.num_tiles(); }

  VSA_DEVICE TilePlace place(int tile) const {
    const int text = tile - grid.num_tiles();
    if (text < 0) {
      const Place at = grid.place(tile);
      return {Region::Video, text, at.first, at.clip};
    }
    if (text < prefix_tiles()) return {Region::Prefix, text, {0, 0, text * kTileRows}, kWhole};
    return {Region::Suffix, text, {0, 0, (text - prefix_tiles()) * kTileRows}, kWhole};
  }
  // Rows of a tile that are real tokens, as a mask.
  VSA_DEVICE uint64_t rows(const TilePlace& at, int batch) const {
    if (at.region == Region::Video) return grid.rows[at.clip];
    return load_global(text_rows + batch * text_tiles + at.text);
  }
  // Rows that a load of a tile brings, clipped ones included.
  VSA_DEVICE int box_rows(const TilePlace& at) const {
    return at.region == Region::Video ? grid.tile.volume() : kTileRows;
  }
  // Position in the sequence of a tile's row, or -1 where the row is past the end.
  VSA_DEVICE int token(const TilePlace& at, int row) const {
    if (at.region == Region::Video) return grid.token({at.first, at.clip}, row);
    const bool prefix = at.region == Region::Prefix;
    const int token = at.first.w + row;
    if (token >= (prefix ? grid.prefix : grid.suffix)) return -1;
    return prefix ? token : grid.suffix_begin() + token;
  }
};

// Which map holds a tile of one head, and where in it.
struct TileBox {
  const TensorMap& map;
  BoxCoordinates at;
};
VSA_DEVICE TileBox box_of(const TokenTensor& x, const TilePlace& place, int head, int batch) {
  const MappedTokens& part = place.region == Region::Video    ? x.video
                             : place.region == Region::Prefix ? x.prefix
                                                              : x.suffix;
  return {part.map,
          {head * part.channels_per_head, place.first.w, place.first.h, place.first.t,
           head * part.outer_per_head + batch * part.outer_per_batch}};
}

// Where one head of a tensor begins in the map of its video, and a tile of it.
struct HeadOrigin {
  int channel, outer;

  VSA_DEVICE BoxCoordinates box(const TilePlace& place) const {
    return {channel, place.first.w, place.first.h, place.first.t, outer};
  }
};
VSA_DEVICE HeadOrigin origin_of(const TokenTensor& x, int head, int batch) {
  const MappedTokens& video = x.video;
  return {head * video.channels_per_head,
          head * video.outer_per_head + batch * video.outer_per_batch};
}

}  // namespace vsa
