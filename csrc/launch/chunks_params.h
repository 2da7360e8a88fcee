// SPDX-License-Identifier: Apache-2.0
// From calls to kernel parameters and the kernels that they need, the same for both machines.
#pragma once
#include "kernels/coarse/chunk_means.h"
#include "kernels/select/reorder_bitmap.h"
#include "launch/chunks.h"
#include "launch/coarse_select_params.h"

namespace vsa::launch {

using ChunkDtypes = Values<Dtype::Bf16, Dtype::Fp16>;

inline TileMeans means_of(const ChunkMeans& call) {
  TileMeans all = {{call.k, call.v}, call.batch, call.head_dim, call.dtype};
  all.tensors.insert(all.tensors.end(), call.queries.begin(), call.queries.end());
  return all;
}

// Elements that a lane reads and stores at a time: 16 bytes where every address allows it, else
// one.
inline int vector_elements(const ChunkMeans& call) {
  TileMeans all = means_of(call);
  for (const auto& [tokens, view] : {std::pair{call.k, call.k_slots},
                                     {call.v, call.v_slots},
                                     {call.k, call.k_text},
                                     {call.v, call.v_text}}) {
    all.tensors.push_back(tokens);
    all.tensors.back().tokens = view;
  }
  return vector_elements(all);
}

inline SlotsToFill slots_to_fill(const ChunkMeans& call,
                                 const MeanTensor& tensor,
                                 const TokenView& slots,
                                 const TokenView& text) {
  const auto writable = [](const void* x) { return static_cast<uint16_t*>(const_cast<void*>(x)); };
  const int64_t lanes = int64_t{call.batch} * tensor.grid.prefix * tensor.heads * call.head_dim /
                        vector_elements(call);
  const int64_t means = int64_t{call.slots} * tensor.grid.num_tiles() * call.head_dim;
  return {writable(text.data),
          writable(slots.data),
          slots.batch_stride,
          slots.token_stride,
          slots.head_stride,
          means,
          text.data != nullptr ? lanes : 0};
}

inline std::string make_params(ChunkMeansParams& p, const ChunkMeans& call) {
  TileMeansParams& plain = p;
  const TileMeans means = means_of(call);
  if (const std::string error = make_params(plain, means); !error.empty()) return error;
  const Grid& grid = call.k.grid;
  for (const MeanTensor& tensor : means.tensors) {
    if (tensor.grid.video.volume() != grid.video.volume() ||
        tensor.grid.num_tiles() != grid.num_tiles() || tensor.grid.suffix != 0 ||
        tensor.sizes != nullptr)
      return "queries, keys and values of a chunk have the same tiles, and text only before them";
  }
  for (int i = 0; i < p.count; ++i)
    p.tensors[i].lanes =
        p.tensors[i].lanes * vector_elements(means) / vector_elements(call);  // stores count, too
  p.slots[0] = slots_to_fill(call, call.k, call.k_slots, call.k_text);
  p.slots[1] = slots_to_fill(call, call.v, call.v_slots, call.v_text);
  p.slots[2] = {};
  p.slots[2].means_stride = int64_t{grid.num_tiles()} * call.head_dim;
  for (const SlotsToFill& slots : p.slots)
    if (slots.text_lanes > INT_MAX) return "text is more than 31 bits can number";
  p.slot = call.slot;
  for (int row = 0; row < kTileRows; ++row) {
    const Axes at = row_offset(grid.tile, row);
    p.row_tokens[row] = (at.t * grid.video.h + at.h) * grid.video.w + at.w;
  }
  return "";
}

// fn(vsa::ChunkMeans) for the element and the width of its loads.
template <class Fn>
void with_chunk_means(const ChunkMeans& call, Fn fn) {
  with_element(call.dtype, ChunkDtypes{}, [&](auto element) {
    using Element = decltype(element);
    if (vector_elements(call) > 1)
      fn(vsa::ChunkMeans<Element, kChunkElements>{});
    else
      fn(vsa::ChunkMeans<Element, 1>{});
  });
}

inline std::string make_params(ReorderBitmapParams& p, const ReorderBitmap& call) {
  if (call.columns % call.per_chunk != 0) return "chunks have equally many columns of a bitmap";
  p = {call.source,  call.target,    call.order,
       call.columns, call.per_chunk, int64_t{call.rows} * bitmap::words(call.columns)};
  return "";
}

}  // namespace vsa::launch
