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
  Axes first;     // tokens: coordinates of row 0 in its region, text along w; else see TileSizes
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

  // Whether rows that are no tokens are stored too, as zeros: a video's lie out of bounds.
  VSA_DEVICE bool stores_padding(const TilePlace& at) const { return at.region != Region::Video; }

  // A tile's place as a TileLoad holds it, what a step along w is in tokens, and the tile's number.
  VSA_DEVICE Axes steps(const TilePlace& at, int tile) const {
    return at.region == Region::Video ? grid.in_tiles(tile) : Axes{0, 0, at.first.w / kTileRows};
  }
  VSA_DEVICE int step_tokens() const { return grid.tile.w; }
  VSA_DEVICE int number(const Axes& steps) const {
    return (steps.t * grid.tiles.h + steps.h) * grid.tiles.w + steps.w;
  }
};

// Padded tiles, each with a number of real tokens of its own: the grid is {tiles, 1, 64} slots in
// tiles of {1, 1, 64}, and the first slots of a tile are its tokens. No padding is ever read, but
// for a query tile without a token, whose first row nobody looks at: the box of a load begins with
// the first slot, and what comes after the last token is out of bounds and zeros.
//
// So the axis of slots has to end where the tokens of a tile end, for every tile at another place.
// A step along h, where these grids have nothing, is a slot too, and the map begins 63 slots before
// the tensor (launch/tensor_map.h): a tile of n tokens begins at h = n - 1 and w = 64 - n, which is
// its first slot, and w ends n slots later. That a box ends out of bounds, and does not begin
// there, is what makes it fast, and here what makes it right: for rows out of bounds TMA reads the
// last row before them again, or if there is none where the map begins
// (bench/log/out-of-bounds.md). So no tile without a token may be loaded as such.
struct TileSizes {
  const int* of_tiles;  // [tiles]; more than 64 are 64, less than none are none; null for a video

  VSA_DEVICE bool known() const { return of_tiles != nullptr; }
  VSA_DEVICE int size(int tile) const {
    const int size = load_global(of_tiles + tile);
    return size > kTileRows ? kTileRows : size;
  }
  // The slots of a tile that are tokens, as a mask.
  VSA_DEVICE uint64_t first_rows(int tile) const {
    const int real = size(tile);
    return real > 0 ? ~uint64_t{0} >> (kTileRows - real) : 0;
  }
};

// A tiled sequence whose tiles may be padded ones. Kernels that never meet those take the sequence
// that it is made from.
struct PaddableSequence : TiledSequence {
  TileSizes sizes;
  // Of a step of a TileLoad: how many tokens further one along w is, and how many tiles.
  int w_tokens, h_tiles, w_tiles;

  VSA_DEVICE bool is_padded(const TilePlace& at) const {
    return sizes.known() && at.region == Region::Video;
  }
  VSA_DEVICE TilePlace place(int tile) const {
    if (!sizes.known() || is_text(tile)) return TiledSequence::place(tile);
    const int real = sizes.size(tile), loaded = real > 0 ? real : 1;
    return {Region::Video, -1, {tile, loaded - 1, kTileRows - loaded}, real > 0 ? kWhole : kClipW};
  }
  VSA_DEVICE uint64_t rows(const TilePlace& at, int batch) const {
    if (!is_padded(at)) return TiledSequence::rows(at, batch);
    return at.clip == kWhole ? ~uint64_t{0} >> at.first.w : 0;
  }
  VSA_DEVICE int token(const TilePlace& at, int row) const {
    if (!is_padded(at)) return TiledSequence::token(at, row);
    return at.clip == kWhole && row + at.first.w < kTileRows ? at.first.t * kTileRows + row : -1;
  }
  // A token of a tile whose numbers may be read where a row is none: the first, or of a padded tile
  // its first slot.
  VSA_DEVICE int readable_token(const TilePlace& at) const {
    return is_padded(at) ? at.first.t * kTileRows : TiledSequence::token(at, 0);
  }
  VSA_DEVICE bool stores_padding(const TilePlace& at) const {
    return sizes.known() || TiledSequence::stores_padding(at);
  }
  // Where a tile is stored: with all slots of a padded one.
  VSA_DEVICE TilePlace stored(TilePlace at) const {
    if (is_padded(at)) at.first = {at.first.t, kTileRows - 1, 0};
    return at;
  }

  VSA_DEVICE Axes steps(const TilePlace& at, int tile) const {
    return sizes.known() ? at.first : TiledSequence::steps(at, tile);
  }
  VSA_DEVICE int step_tokens() const { return w_tokens; }
  VSA_DEVICE int number(const Axes& steps) const {
    return steps.t * grid.tiles.h * grid.tiles.w + steps.h * h_tiles + steps.w * w_tiles;
  }
};
// On the host.
inline PaddableSequence paddable(const TiledSequence& sequence, TileSizes sizes) {
  const bool padded = sizes.of_tiles != nullptr;
  return {sequence, sizes, padded ? 1 : sequence.grid.tile.w, padded ? 0 : sequence.grid.tiles.w,
          padded ? 0 : 1};
}

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
