// SPDX-License-Identifier: Apache-2.0
// The fine stage in vsa._C: which fields each call has, and what runs it.
#include "launch/fine.h"

#include "bind/fields.h"
#include "launch/clean_text.h"

namespace vsa::bind {
namespace {

struct FineHeadDim : OneOf<launch::FineHeadDims> {};
struct FineDtype : OneOf<launch::FineDtypes> {};

void bind_problem(py::module_& m) {
  using Call = launch::FineProblem;
  bind_struct<Call>(
      m, kClass<Call>, "What both directions of the fine stage are told.",
      {VSA_FIELD(Call, grid), VSA_FIELD(Call, kv_grid), VSA_FIELD(Call, batch, Positive),
       VSA_FIELD(Call, heads, Positive), VSA_FIELD(Call, kv_heads, Positive),
       VSA_FIELD(Call, head_dim, FineHeadDim), VSA_FIELD(Call, dtype, FineDtype),
       VSA_FIELD(Call, scale), VSA_FIELD(Call, bitmap, NotNull),
       VSA_FIELD(Call, query_axes, NotNull), VSA_FIELD(Call, query_text_rows),
       VSA_FIELD(Call, key_text_rows), VSA_FIELD(Call, sizes), VSA_FIELD(Call, kv_sizes)});
}

void bind_gates(py::module_& m) {
  using Call = launch::Gates;
  bind_struct<Call>(m, kClass<Call>, "The gates of a call; zeros for those that are not there.",
                    {VSA_FIELD(Call, fine), VSA_FIELD(Call, coarse), VSA_FIELD(Call, coarse_rows)});
}

void bind_forward(py::module_& m) {
  using Call = launch::FineForward;
  auto bound = bind_struct<Call>(
      m, kClass<Call>, "One call of the forward kernel.",
      {inherited<Call, launch::FineProblem>("problem"), VSA_FIELD(Call, q, NotNull),
       VSA_FIELD(Call, k, NotNull), VSA_FIELD(Call, v, NotNull), VSA_FIELD(Call, out, NotNull),
       VSA_FIELD(Call, fine), VSA_FIELD(Call, gates), VSA_FIELD(Call, lse, NotNull),
       VSA_FIELD(Call, tile_counter, NotNull), VSA_FIELD(Call, order), VSA_FIELD(Call, long_ones)});
  bind_run<launch::fine_forward, launch::fine_forward_emulated>(bound);
}

void bind_backward(py::module_& m) {
  using Call = launch::FineBackward;
  auto bound =
      bind_struct<Call>(m, kClass<Call>, "One call of the backward kernels; its rows come first.",
                        {inherited<Call, launch::FineProblem>("problem"),
                         VSA_FIELD(Call, q, NotNull),
                         VSA_FIELD(Call, k, NotNull),
                         VSA_FIELD(Call, v, NotNull),
                         VSA_FIELD(Call, grad_fine, NotNull),
                         VSA_FIELD(Call, grad_q, NotNull),
                         VSA_FIELD(Call, grad_k, NotNull),
                         VSA_FIELD(Call, grad_v, NotNull),
                         VSA_FIELD(Call, fine_out, NotNull),
                         VSA_FIELD(Call, grad_out, NotNull),
                         VSA_FIELD(Call, grad_fine_tokens, NotNull),
                         VSA_FIELD(Call, gates),
                         VSA_FIELD(Call, grad_gate_fine),
                         VSA_FIELD(Call, grad_gate_coarse),
                         VSA_FIELD(Call, grad_coarse),
                         VSA_FIELD(Call, grad_q_means),
                         VSA_FIELD(Call, grad_k_means),
                         VSA_FIELD(Call, grad_v_means),
                         VSA_FIELD(Call, transposed_bitmap, NotNull),
                         VSA_FIELD(Call, key_axes, NotNull),
                         VSA_FIELD(Call, key_order, NotNull),
                         VSA_FIELD(Call, long_keys, NotNull),
                         VSA_FIELD(Call, query_order),
                         VSA_FIELD(Call, long_queries),
                         VSA_FIELD(Call, lse, NotNull),
                         VSA_FIELD(Call, grad_lse),
                         VSA_FIELD(Call, tile_counters, NotNull),
                         VSA_FIELD(Call, grad_q_sums),
                         VSA_FIELD(Call, row_stats, NotNull)});
  bind_run<launch::backward_rows, launch::backward_rows_emulated>(
      bound, {"launch_rows", "emulate_rows", "step_rows"});
  bind_run<launch::fine_backward, launch::fine_backward_emulated>(bound);
}

void bind_transpose(py::module_& m) {
  using Call = launch::BitmapTranspose;
  auto bound = bind_struct<Call>(
      m, "BitmapTranspose",
      "Bitmaps with rows and columns exchanged, and how many bits each row then has.",
      {VSA_FIELD(Call, source, NotNull), VSA_FIELD(Call, target, NotNull),
       VSA_FIELD(Call, counts, NotNull), VSA_FIELD(Call, bitmaps, Positive),
       VSA_FIELD(Call, rows, Positive), VSA_FIELD(Call, columns, Positive)});
  bind_run<launch::transpose_bitmaps, launch::transpose_bitmaps_emulated>(bound);
}

void bind_axes(py::module_& m) {
  using Call = launch::AxisChoice;
  auto bound = bind_struct<Call>(
      m, "AxisChoice",
      "The axis along which tiles are taken together, ALONG_W or ALONG_T, and BACKWARDS.",
      {VSA_FIELD(Call, bitmap, NotNull), VSA_FIELD(Call, axes, NotNull),
       VSA_FIELD(Call, batch, Positive), VSA_FIELD(Call, heads, Positive),
       VSA_FIELD(Call, groups, Positive), VSA_FIELD(Call, words, Positive), VSA_FIELD(Call, tiles),
       VSA_FIELD(Call, counters), VSA_FIELD(Call, count, NotNegative)});
  bind_run<launch::choose_axes, launch::choose_axes_emulated>(bound);
}

void bind_order(py::module_& m) {
  using Call = launch::GroupSort;
  auto bound = bind_struct<Call>(
      m, "GroupSort", "The order of groups of neighbouring tiles, the longest row first.",
      {VSA_FIELD(Call, counts, NotNull), VSA_FIELD(Call, axes, NotNull),
       VSA_FIELD(Call, order, NotNull), VSA_FIELD(Call, long_ones, NotNull),
       VSA_FIELD(Call, batch, Positive), VSA_FIELD(Call, heads, Positive),
       VSA_FIELD(Call, head_groups, Positive), VSA_FIELD(Call, tiles, Positive),
       VSA_FIELD(Call, text_tiles, NotNegative), VSA_FIELD(Call, layers, Positive),
       VSA_FIELD(Call, together, Positive)});
  bind_run<launch::sort_groups, launch::sort_groups_emulated>(bound);
}

void bind_text(py::module_& m) {
  using Tensor = launch::TextTensor;
  bind_struct<Tensor>(m, kClass<Tensor>, "One of a launch: a tensor whose text is copied.",
                      {VSA_FIELD(Tensor, tokens, NotNull), VSA_FIELD(Tensor, length, Positive),
                       VSA_FIELD(Tensor, heads, Positive), VSA_FIELD(Tensor, clean, NotNull)});
  using Call = launch::CleanText;
  auto bound = bind_struct<Call>(
      m, "CleanText",
      "Which rows of the text's tiles are real tokens, and copies of text with zeros elsewhere.",
      {VSA_FIELD(Call, valid), VSA_FIELD(Call, valid_batch_stride),
       VSA_FIELD(Call, valid_token_stride), VSA_FIELD(Call, batch, Positive),
       VSA_FIELD(Call, prefix, NotNegative), VSA_FIELD(Call, suffix, NotNegative),
       VSA_FIELD(Call, head_dim, FineHeadDim), VSA_FIELD(Call, rows, NotNull),
       VSA_FIELD(Call, tensors)});
  bind_run<launch::clean_text, launch::clean_text_emulated>(bound);
}

}  // namespace

void bind_fine(py::module_& m) {
  bind_problem(m);
  bind_gates(m);
  bind_forward(m);
  bind_backward(m);
  bind_transpose(m);
  bind_axes(m);
  bind_order(m);
  bind_text(m);
  m.attr("HEAD_DIMS") = FineHeadDim::all();
  m.attr("ELEMENTS") = FineDtype::all();
  m.attr("KEY_TILES_PER_GROUP") = launch::kKeyTilesPerGroup;
  m.def("query_tiles_per_group", launch::query_tiles_per_group, py::arg("head_dim"),
        "Query tiles that a block of the forward works on together.");
  m.def("backward_query_tiles_per_group", launch::backward_query_tiles_per_group,
        py::arg("head_dim"), "The same of the pass over query tiles of the backward.");
  m.attr("ALONG_W") = kAlongW;
  m.attr("ALONG_T") = kAlongT;
  m.attr("BACKWARDS") = kBackwards;
}

}  // namespace vsa::bind
