// SPDX-License-Identifier: Apache-2.0
// From a call of the tail to kernel parameters, the same for both machines.
#pragma once
#include "kernels/tail/backward_means.h"
#include "kernels/tail/backward_queries.h"
#include "kernels/tail/forward.h"
#include "kernels/tail/round_means.h"
#include "kernels/tail/sum_parts.h"
#include "launch/fine_params.h"
#include "launch/tail.h"

namespace vsa::launch {

template <class Encode>
std::string make_keys(vsa::TailKeys& p, const TailKeys& x, const FineProblem& call, Encode encode) {
  p.bias = x.bias;
  p.tiles = call.kv_grid.num_tiles();
  const int64_t head = int64_t{p.tiles} * call.head_dim;
  const Axes extent = {1, 1, p.tiles}, box = {1, 1, kTileRows};
  const auto make = [&](MappedTokens& to, const void* data) {
    const TokenView view = {data, head * call.kv_heads, call.head_dim, head};
    const std::optional<Folding> folded = folding(view, call.batch, call.kv_heads);
    if (!folded) return std::string("the strides of batch and heads do not fold into one axis");
    to.channels_per_head = folded->channels_per_head;
    to.outer_per_head = folded->outer_per_head;
    to.outer_per_batch = folded->outer_per_batch;
    return encode(to.map, map_arguments(view, *folded, call.batch, call.kv_heads, call.head_dim,
                                        extent, box));
  };
  std::string error = make(p.k, x.k);
  if (error.empty()) error = make(p.k_low, x.k_low);
  if (error.empty()) error = make(p.v, x.v);
  return error.empty() ? "" : "the means cannot be addressed by TMA: " + error;
}

template <class FineParams, class Encode>
std::string make_params(TailForwardParams<FineParams>& p, const TailForward& call, Encode encode) {
  p.text = any(call.gates);
  const std::string error = make_params(static_cast<FineParams&>(p), call, encode);
  p.queries = static_cast<FineParams&>(p).queries;
  return error.empty() ? make_keys(p.tail, call.tail, call, encode) : error;
}

// A contiguous tensor from its first token on.
inline TokenView whole(const SequenceView& x, const Grid& grid) {
  TokenView view = x.video;
  const auto* video = static_cast<const uint16_t*>(view.data);
  view.data = video - grid.prefix * view.token_stride;
  return view;
}

template <class Encode>
std::string make_params(TailBackwardParams& p, const TailBackward& call, Encode encode) {
  p.queries = tiled(call.grid, call.query_text_rows);
  p.bitmap = call.bitmap;
  p.row_stats = static_cast<const RowStats*>(call.row_stats);
  p.grad_q_rows = token_rows<uint16_t>(whole(call.grad_q, call.grid));
  p.parts = call.parts;
  p.splits = call.splits;
  p.batch = call.batch;
  p.heads = call.heads;
  p.kv_heads = call.kv_heads;
  p.scale = call.scale;
  p.scale_log2 = call.scale * static_cast<float>(M_LOG2E);
  const std::string error =
      make_tensors({{"q", p.q, call.q, call.grid, call.heads},
                    {"grad_fine", p.grad_out, call.grad_fine, call.grid, call.heads},
                    {"dq", p.grad_q, call.grad_q, call.grid, call.heads}},
                   call.batch, call.head_dim, encode);
  return error.empty() ? make_keys(p.tail, call.tail, call, encode) : error;
}

inline RoundMeansParams round_means_params(const RoundMeans& call) {
  const int64_t rows = int64_t{call.batch} * call.kv_heads * call.kv_grid.num_tiles();
  const auto pairs = [](const void* x) { return static_cast<uint32_t*>(const_cast<void*>(x)); };
  return {call.k_means,
          call.v_means,
          pairs(call.to.k),
          pairs(call.to.k_low),
          pairs(call.to.v),
          rows * call.head_dim / 2,
          const_cast<float*>(call.to.bias),
          call.kv_grid};
}
// Lanes that have something to do.
inline int64_t lanes(const RoundMeansParams& p) {
  return p.pairs > p.padded() ? p.pairs : p.padded();
}

inline SumPartsParams sum_parts_params(const TailBackward& call) {
  const int64_t rows = int64_t{call.batch} * call.kv_heads * call.kv_grid.num_tiles();
  return {call.parts, call.splits, rows * call.head_dim, call.scale,
          call.sum_k, call.sum_v,  call.accumulate};
}

}  // namespace vsa::launch
