// SPDX-License-Identifier: Apache-2.0
// How a tensor of tokens becomes maps of five axes that the TMA engine can walk. Three axes are the
// video's; the channel axis is one; head and batch share what is left.
#pragma once
#include <optional>
#include <string>

#include "kernels/schedule/sequence.h"
#include "launch/fine.h"

namespace vsa::launch {

// The arguments of cuTensorMapEncodeTiled; 16-bit elements, 128-byte swizzle, zeros out of bounds.
struct MapArguments {
  void* base;
  uint64_t dims[5];     // elements: channel, w, h, t, outer
  uint64_t strides[4];  // bytes: w, h, t, outer
  uint32_t box[5];      // elements
};

// Where heads and batch elements are found, the same for all maps of a tensor.
struct Folding {
  int channels_per_head, outer_per_head, outer_per_batch;
};

// Heads that lie inside a token become channels. Heads outside share the last axis with the batch,
// which works where batch elements follow each other as heads do.
inline std::optional<Folding> folding(const TokenView& x, int batch, int heads) {
  if (heads == 1 || x.head_stride < x.token_stride)
    return Folding{heads == 1 ? 0 : static_cast<int>(x.head_stride), 0, 1};
  if (batch == 1 || x.batch_stride == x.head_stride * heads) return Folding{0, 1, heads};
  return std::nullopt;
}

inline MapArguments map_arguments(const TokenView& x,
                                  const Folding& folding,
                                  int batch,
                                  int heads,
                                  int head_dim,
                                  Axes extent,
                                  Axes box,
                                  bool padded = false) {
  const bool inside = folding.outer_per_head == 0;
  const auto size = [](int64_t n) { return static_cast<uint64_t>(n); };
  const uint64_t token = size(x.token_stride) * kElementBytes;
  const int64_t channels =
      inside ? int64_t{heads - 1} * folding.channels_per_head + head_dim : head_dim;
  const int64_t outer_stride = inside ? x.batch_stride : x.head_stride;
  MapArguments map{};
  map.base = const_cast<void*>(x.data);
  map.dims[0] = size(channels);
  map.dims[1] = size(extent.w);
  map.dims[2] = size(extent.h);
  map.dims[3] = size(extent.t);
  map.dims[4] = size(inside ? batch : int64_t{batch} * heads);
  map.strides[0] = token;
  map.strides[1] = token * size(extent.w);
  map.strides[2] = token * size(extent.w) * size(extent.h);
  // An axis of one element has no stride of its own, but the driver wants a multiple of 16.
  map.strides[3] =
      map.dims[4] == 1 ? map.strides[2] * size(extent.t) : size(outer_stride) * kElementBytes;
  if (padded) {  // TileSizes
    map.base = static_cast<char*>(map.base) - (kTileRows - 1) * token;
    map.dims[2] = kTileRows;
    map.strides[1] = token;
  }
  map.box[0] = kPanelChannels;
  map.box[1] = static_cast<uint32_t>(box.w);
  map.box[2] = static_cast<uint32_t>(box.h);
  map.box[3] = static_cast<uint32_t>(box.t);
  map.box[4] = 1;
  return map;
}

// All maps of a tensor through `encode(map, arguments) -> error`; the empty string if all is well.
// padded: its grid is of padded tiles
template <class Encode>
std::string make_tensor(TokenTensor& tensor,
                        const SequenceView& x,
                        const Grid& grid,
                        bool padded,
                        int batch,
                        int heads,
                        int head_dim,
                        Encode encode) {
  struct Part {
    MappedTokens& to;
    const TokenView& view;
    Axes extent, box;
  };
  const Axes text_box = {1, 1, kTileRows};
  const Part parts[] = {{tensor.video, x.video, grid.video, grid.tile},
                        {tensor.prefix, x.prefix, {1, 1, grid.prefix}, text_box},
                        {tensor.suffix, x.suffix, {1, 1, grid.suffix}, text_box}};
  for (const Part& part : parts) {
    if (part.extent.volume() == 0) continue;
    const std::optional<Folding> folded = folding(part.view, batch, heads);
    if (!folded) return "the strides of batch and heads do not fold into one axis";
    part.to.channels_per_head = folded->channels_per_head;
    part.to.outer_per_head = folded->outer_per_head;
    part.to.outer_per_batch = folded->outer_per_batch;
    const MapArguments map = map_arguments(part.view, *folded, batch, heads, head_dim, part.extent,
                                           part.box, padded && &part == parts);
    const std::string error = encode(part.to.map, map);
    if (!error.empty()) return error;
  }
  return "";
}

}  // namespace vsa::launch
