// SPDX-License-Identifier: Apache-2.0
// Calls under a mask over tiles in vsa._C: which fields each has, and what runs it.
#include "launch/masked_coarse.h"

#include "bind/fields.h"

namespace vsa::bind {

void bind_masked_coarse(py::module_& m) {
  using Mask = launch::MaskOfTiles;
  bind_struct<Mask>(
      m, kClass<Mask>, "A rule over tiles, or bitmaps of what rows may choose.",
      {VSA_FIELD(Mask, rule), VSA_FIELD(Mask, allowed), VSA_FIELD(Mask, mask_heads, NotNegative)});
  using Means = launch::MaskedTileMeans;
  auto means = bind_struct<Means>(
      m, "MaskedTileMeans", "Tile means; zeros for key tiles that no row may choose.",
      {inherited<Means, launch::TileMeans>("means"), VSA_FIELD(Means, rule),
       VSA_FIELD(Means, first_of_keys, NotNegative)});
  bind_run<launch::masked_tile_means, launch::masked_tile_means_emulated>(means);
  using Select = launch::MaskedSelectTiles;
  auto select = bind_struct<Select>(m, "MaskedSelectTiles",
                                    "SelectTiles among the tiles that each row may choose.",
                                    {inherited<Select, launch::SelectTiles>("select"),
                                     VSA_FIELD(Select, mask), VSA_FIELD(Select, shares)});
  bind_run<launch::masked_select_tiles, launch::masked_select_tiles_emulated>(select);
  using Softmax = launch::MaskedSoftmaxRows;
  auto softmax = bind_struct<Softmax>(
      m, "MaskedSoftmaxRows", "SoftmaxRows over the tiles that each row may choose.",
      {inherited<Softmax, launch::SoftmaxRows>("softmax"), VSA_FIELD(Softmax, mask),
       VSA_FIELD(Softmax, first_row, NotNegative), VSA_FIELD(Softmax, query_tiles, Positive)});
  bind_run<launch::masked_softmax_rows, launch::masked_softmax_rows_emulated>(softmax);
  using Products = launch::MaskedProducts;
  auto products = bind_struct<Products>(
      m, "MaskedProducts", "Products without what no row may choose.",
      {inherited<Products, launch::Products>("products"), VSA_FIELD(Products, rule),
       VSA_FIELD(Products, first_query, NotNegative), VSA_FIELD(Products, sides)});
  bind_run<launch::masked_multiply, launch::masked_multiply_emulated>(products);
  using Gradient = launch::MaskedScoreGradient;
  auto gradient = bind_struct<Gradient>(
      m, "MaskedScoreGradient", "ScoreGradient without what no row may choose.",
      {inherited<Gradient, launch::ScoreGradient>("gradient"), VSA_FIELD(Gradient, rule),
       VSA_FIELD(Gradient, first_query, NotNegative)});
  bind_run<launch::masked_score_gradient, launch::masked_score_gradient_emulated>(gradient);
  m.attr("ROWS_AND_COLUMNS") = launch::kRowsAndColumns;
  m.attr("ROWS_AND_DEPTH") = launch::kRowsAndDepth;
  m.attr("DEPTH_AND_ROWS") = launch::kDepthAndRows;
}

}  // namespace vsa::bind
