// SPDX-License-Identifier: Apache-2.0
// From a call to kernel parameters, the same for both machines.
#pragma once
#include <cmath>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "kernels/fine/backward_keys.h"
#include "kernels/fine/backward_queries.h"
#include "kernels/fine/forward.h"
#include "kernels/fine/round_sums.h"
#include "launch/element.h"
#include "launch/tensor_map.h"

namespace vsa::launch {

// What GroupSort is told to be the tiles of a group.
template <int D>
constexpr bool kGroupsAreConsumers =
    query_tiles_per_group(D) == FineForwardConfig<Bf16, D>::kConsumers &&
    kKeyTilesPerGroup == FineBackwardKeysConfig<Bf16, D>::kConsumers &&
    backward_query_tiles_per_group(D) == FineBackwardQueriesConfig<Bf16, D>::kConsumers;
static_assert(kGroupsAreConsumers<64> && kGroupsAreConsumers<128>, "a tile for each consumer");

inline PaddableSequence tiled(const Grid& grid,
                              const uint64_t* text_rows,
                              const int* sizes = nullptr) {
  const int text_tiles = ceil_div(grid.prefix, kTileRows) + ceil_div(grid.suffix, kTileRows);
  return paddable({grid, text_tiles, text_rows}, {sizes});
}

// One tensor of a call and where its maps go.
struct MappedTensor {
  const char* name;
  TokenTensor& to;
  const SequenceView& from;
  const Grid& grid;
  int heads;
  const int* sizes = nullptr;  // of padded tiles
};

// A TileLoad holds 16 bits for each axis.
inline bool fits_a_tile_load(const Grid& grid) {
  const int text = grid.prefix > grid.suffix ? grid.prefix : grid.suffix;
  return grid.tiles.t <= TileLoad::kMostTiles && grid.tiles.h <= TileLoad::kMostTiles &&
         grid.tiles.w <= TileLoad::kMostTiles && ceil_div(text, kTileRows) <= TileLoad::kMostTiles;
}

template <class Encode>
std::string make_tensors(std::initializer_list<MappedTensor> tensors,
                         int batch,
                         int head_dim,
                         Encode encode) {
  for (const MappedTensor& x : tensors) {
    if (!fits_a_tile_load(x.grid))
      return std::string(x.name) + " has more than " + std::to_string(TileLoad::kMostTiles) +
             " tiles along an axis of its grid or in its text, which is what the kernels take";
    const std::string error =
        make_tensor(x.to, x.from, x.grid, x.sizes != nullptr, batch, x.heads, head_dim, encode);
    if (!error.empty()) return std::string(x.name) + " cannot be addressed by TMA: " + error;
  }
  return "";
}

template <class Encode>
std::string make_params(FineForwardParams& p, const FineForward& call, Encode encode) {
  p.queries = tiled(call.grid, call.query_text_rows, call.sizes);
  p.keys = tiled(call.kv_grid, call.key_text_rows, call.kv_sizes);
  p.bitmap = call.bitmap;
  p.query_axes = call.query_axes;
  p.lse = call.lse;
  p.batch = call.batch;
  p.heads = call.heads;
  p.kv_heads = call.kv_heads;
  p.scale = call.scale * static_cast<float>(M_LOG2E);
  p.tile_counter = call.tile_counter;
  p.order = {call.order, call.long_ones};
  return make_tensors({{"q", p.q, call.q, call.grid, call.heads, call.sizes},
                       {"k", p.k, call.k, call.kv_grid, call.kv_heads, call.kv_sizes},
                       {"v", p.v, call.v, call.kv_grid, call.kv_heads, call.kv_sizes},
                       {"out", p.out, call.out, call.grid, call.heads, call.sizes}},
                      call.batch, call.head_dim, encode);
}

// Empty where the kernels of one pass take a call, if it is for them. Both who zero sums and who
// add them up ask.
inline std::string refused_one_pass(const FineBackward& call) {
  const auto has_text = [](const Grid& grid) { return grid.prefix + grid.suffix > 0; };
  if (call.grad_q_sums == nullptr ||
      (call.head_dim == 64 && !has_text(call.grid) && !has_text(call.kv_grid) &&
       call.sizes == nullptr && call.kv_sizes == nullptr))
    return "";
  return "grad_q_sums must be null but for heads of 64 channels and a video without text or padded "
         "tiles: only those have a backward in one pass";
}

template <class Encode>
std::string make_params(FineBackwardParams& p, const FineBackward& call, Encode encode) {
  p.queries = tiled(call.grid, call.query_text_rows, call.sizes);
  p.keys = tiled(call.kv_grid, call.key_text_rows, call.kv_sizes);
  p.bitmap = call.bitmap;
  p.transposed_bitmap = call.transposed_bitmap;
  p.row_stats = static_cast<const RowStats*>(call.row_stats);
  p.query_axes = call.query_axes;
  p.key_axes = call.key_axes;
  p.key_order = {call.key_order, call.long_keys};
  p.query_order = {call.query_order, call.long_queries};
  p.key_tile_counter = call.tile_counters;
  p.query_tile_counter = call.tile_counters + 1;
  p.grad_q_sums = call.grad_q_sums;
  if (std::string refused = refused_one_pass(call); !refused.empty()) return refused;
  p.grad_q_means = {call.grad_q_means};
  p.grad_k_means = {call.grad_k_means};
  p.grad_v_means = {call.grad_v_means};
  p.batch = call.batch;
  p.heads = call.heads;
  p.kv_heads = call.kv_heads;
  p.scale = call.scale;
  p.scale_log2 = call.scale * static_cast<float>(M_LOG2E);
  return make_tensors({{"q", p.q, call.q, call.grid, call.heads, call.sizes},
                       {"k", p.k, call.k, call.kv_grid, call.kv_heads, call.kv_sizes},
                       {"v", p.v, call.v, call.kv_grid, call.kv_heads, call.kv_sizes},
                       {"grad_fine", p.grad_out, call.grad_fine, call.grid, call.heads, call.sizes},
                       {"dq", p.grad_q, call.grad_q, call.grid, call.heads, call.sizes},
                       {"dk", p.grad_k, call.grad_k, call.kv_grid, call.kv_heads, call.kv_sizes},
                       {"dv", p.grad_v, call.grad_v, call.kv_grid, call.kv_heads, call.kv_sizes}},
                      call.batch, call.head_dim, encode);
}

template <class T>
TokenRows<T> token_rows(const TokenView& x) {
  return {static_cast<T*>(const_cast<void*>(x.data)), x.batch_stride, x.token_stride,
          x.head_stride};
}

inline Gate gate(const GateView& x) {
  const int64_t strides = x.batch_stride | x.token_stride | x.head_stride;
  const bool aligned =
      strides % kChunkElements == 0 && reinterpret_cast<uintptr_t>(x.data) % kChunkBytes == 0;
  const bool vectorized = !x.fp32 && x.channel_stride == 1 && aligned;
  return {x.data,         x.fp32,        vectorized,      x.batch_stride,
          x.token_stride, x.head_stride, x.channel_stride};
}

template <class Encode>
std::string make_params(GatedForwardParams& p, const FineForward& call, Encode encode) {
  p.gate_fine = gate(call.gates.fine);
  p.gate_coarse = gate(call.gates.coarse);
  p.coarse = call.gates.coarse_rows;
  p.keeps_fine = call.fine.video.data != nullptr;
  const std::string error = make_params(static_cast<FineForwardParams&>(p), call, encode);
  if (!error.empty() || !p.keeps_fine) return error;
  return make_tensors({{"fine", p.fine, call.fine, call.grid, call.heads, call.sizes}}, call.batch,
                      call.head_dim, encode);
}

inline bool any(const Gates& gates) {
  return gates.fine.data != nullptr || gates.coarse.data != nullptr;
}

inline BackwardRowsParams backward_rows_params(const FineBackward& call) {
  return {token_rows<const uint16_t>(call.fine_out),
          token_rows<const uint16_t>(call.grad_out),
          call.lse,
          call.grad_lse,
          tiled(call.grid, call.query_text_rows, call.sizes),
          static_cast<RowStats*>(call.row_stats),
          call.heads,
          gate(call.gates.fine),
          gate(call.gates.coarse),
          call.gates.coarse_rows,
          token_rows<uint16_t>(call.grad_fine_tokens),
          {call.grad_gate_fine, call.gates.fine.fp32},
          {call.grad_gate_coarse, call.gates.coarse.fp32},
          call.grad_coarse,
          call.grad_q_sums};
}

inline RoundSumsParams round_sums_params(const FineBackward& call,
                                         const FineBackwardParams& params) {
  return {call.grad_q_sums,    token_rows<uint16_t>(call.grad_q.video),
          params.grad_q_means, params.queries,
          call.heads,          call.scale};
}

// fn(Element{}, integral_constant head_dim) for the dtype and head_dim of a call; false if there
// are no kernels for them.
template <class Call, class Fn>
bool with_config(const Call& call, Fn fn) {
  const auto with_head_dim = [&]<int... D>(auto element, Values<D...>) {
    return ((call.head_dim == D && (fn(element, std::integral_constant<int, D>{}), true)) || ...);
  };
  bool found = false;
  with_element(call.dtype, FineDtypes{},
               [&](auto element) { found = with_head_dim(element, FineHeadDims{}); });
  return found;
}

constexpr const char* kNoConfig = "the fine kernels are not built for this head_dim and dtype";

}  // namespace vsa::launch
