// SPDX-License-Identifier: Apache-2.0
// Means and selection in vsa._C: which fields each call has, and what runs it.
#include "launch/coarse_select.h"

#include "bind/fields.h"

namespace vsa::bind {
namespace {

using MeanDtype = OneOf<launch::MeanDtypes>;

void bind_means(py::module_& m) {
  using Tensor = launch::MeanTensor;
  bind_struct<Tensor>(
      m, kClass<Tensor>, "A tensor of tokens, and where the means of its tiles go.",
      {VSA_FIELD(Tensor, tokens, NotNull), VSA_FIELD(Tensor, grid), VSA_FIELD(Tensor, sizes),
       VSA_FIELD(Tensor, heads, Positive), VSA_FIELD(Tensor, means, NotNull)});
  using Call = launch::TileMeans;
  auto bound =
      bind_struct<Call>(m, "TileMeans", "Means of the tiles of up to three tensors.",
                        {VSA_FIELD(Call, tensors), VSA_FIELD(Call, batch, Positive),
                         VSA_FIELD(Call, head_dim, Positive), VSA_FIELD(Call, dtype, MeanDtype)});
  bind_run<launch::tile_means, launch::tile_means_emulated>(bound);
}

void bind_selection(py::module_& m) {
  using Call = launch::SelectTiles;
  auto bound = bind_struct<Call>(
      m, "SelectTiles", "The tiles that rows of scores keep, and their softmax.",
      {VSA_FIELD(Call, scores, NotNull), VSA_FIELD(Call, must), VSA_FIELD(Call, bitmap, NotNull),
       VSA_FIELD(Call, weights), VSA_FIELD(Call, first_row, NotNegative),
       VSA_FIELD(Call, rows, Positive), VSA_FIELD(Call, columns, Positive),
       VSA_FIELD(Call, query_tiles, Positive), VSA_FIELD(Call, counts, AllPositive),
       VSA_FIELD(Call, mass, Share), VSA_FIELD(Call, oldest), VSA_FIELD(Call, ring, NotNegative),
       VSA_FIELD(Call, per_slot, NotNegative)});
  bind_run<launch::select_tiles, launch::select_tiles_emulated>(bound);
}

void bind_softmax(py::module_& m) {
  using Call = launch::SoftmaxRows;
  auto bound = bind_struct<Call>(m, "SoftmaxRows", "The softmax of rows of scores, in place.",
                                 {VSA_FIELD(Call, scores, NotNull), VSA_FIELD(Call, rows, Positive),
                                  VSA_FIELD(Call, columns, Positive)});
  bind_run<launch::softmax_rows, launch::softmax_rows_emulated>(bound);
}

}  // namespace

void bind_coarse_select(py::module_& m) {
  bind_means(m);
  bind_selection(m);
  bind_softmax(m);
  m.attr("MEAN_ELEMENTS") = MeanDtype::all();
  m.attr("MOST_HEAD_BUDGETS") = launch::kMostHeadBudgets;
}

}  // namespace vsa::bind
