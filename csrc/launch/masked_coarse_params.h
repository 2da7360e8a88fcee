// SPDX-License-Identifier: Apache-2.0
// From calls under a mask to kernel parameters and the kernels that they need, the same for both
// machines.
#pragma once
#include <algorithm>

#include "launch/coarse_select_params.h"
#include "launch/float_product_params.h"
#include "launch/masked_coarse.h"

namespace vsa::launch {

inline std::string make_rule(TileRule& to, const std::vector<int>& numbers) {
  if (numbers.size() != TileRule::kNumbers)
    return "a rule over tiles is " + std::to_string(TileRule::kNumbers) + " numbers, not " +
           std::to_string(numbers.size());
  int n[TileRule::kNumbers];
  std::copy(numbers.begin(), numbers.end(), n);
  for (int i = 0; i < 4; ++i)
    if (n[i] <= 0) return "a rule over tiles needs tiles along each axis";
  for (int i = 4; i < 9; ++i)
    if (n[i] < 0) return "a rule over tiles has no negative number before its reach";
  if (n[8] > 0 && n[5] == 0) return "a rule over two videos needs chunks";
  const int64_t layer = int64_t{n[2]} * n[3];
  if (layer * std::max(n[0], n[1]) > INT_MAX / 2)
    return "a rule over tiles has more of them than 31 bits can number";
  to = vsa::make_rule(n);
  return "";
}

inline std::string make_mask(TileMask& to, const MaskOfTiles& mask, int query_tiles, int columns) {
  to.allowed = mask.allowed;
  to.heads = mask.mask_heads;
  to.query_tiles = query_tiles;
  to.columns = columns;
  if (mask.allowed != nullptr) {
    to.rule = {};
    return mask.mask_heads > 0 ? "" : "a mask over tiles needs heads";
  }
  if (const std::string error = make_rule(to.rule, mask.rule); !error.empty()) return error;
  if (to.rule.num_query_tiles() != query_tiles || to.rule.num_key_tiles() != columns)
    return "a rule over tiles is for other numbers of tiles than the scores";
  return "";
}

inline std::string make_params(MaskedTileMeansParams& p, const MaskedTileMeans& call) {
  TileMeansParams& plain = p;
  if (const std::string error = make_params(plain, static_cast<const TileMeans&>(call));
      !error.empty())
    return error;
  p.first_of_keys = call.first_of_keys;
  if (const std::string error = make_rule(p.rule, call.rule); !error.empty()) return error;
  for (int i = 0; i < p.count; ++i)
    if (i >= p.first_of_keys && p.tensors[i].grid.num_tiles() != p.rule.num_key_tiles())
      return "a rule over tiles is for another number of key tiles than the grid";
  return "";
}

template <class Fn>
void with_masked_means(const MaskedTileMeans& call, Fn fn) {
  with_means(call, [&]<class Element, int N>(vsa::TileMeans<Element, N>) {
    fn(vsa::TileMeans<Element, N, true>{});
  });
}

inline std::string make_params(MaskedSelectParams& p, const MaskedSelectTiles& call) {
  SelectTilesParams& plain = p;
  if (const std::string error = make_params(plain, static_cast<const SelectTiles&>(call));
      !error.empty())
    return error;
  if (call.shares.size() != call.counts.size())
    return "budgets under a mask are as many shares as counts";
  if (call.oldest != nullptr) return "columns under a mask are in order, and no slots of a ring";
  std::copy(call.shares.begin(), call.shares.end(), p.shares);
  return make_mask(p.mask, call.mask, call.query_tiles, call.columns);
}

// fn.operator()<Kernel>() for the mask and the length of a row: short rows stay in registers, under
// a rule that allows runs of columns in no more than they need.
template <class Fn>
void with_masked_selection(const MaskedSelectParams& p, Fn fn) {
  constexpr int kShort = 32, kPart = 8;  // scores per lane: at most, and of longer rows at a time
  const auto with_mass = [&]<bool ByMass>() {
    const auto with_runs = [&]<int Held>(const auto& self) {
      using Kernel = vsa::SelectTiles<Held, false, ByMass, AllowedRuns>;
      if (p.columns <= Kernel::Row::kColumns)
        fn.template operator()<Kernel>();
      else if constexpr (Held < kShort)
        self.template operator()<Held + Kernel::Row::kStep>(self);
      else
        fn.template operator()<vsa::SelectTiles<kShort, true, ByMass, AllowedRuns>>();
    };
    if (p.mask.has_runs())
      with_runs.template operator()<8>(with_runs);
    else if (p.columns <= kShort * kWarpThreads)
      fn.template operator()<vsa::SelectTiles<kShort, false, ByMass, AllowedTiles>>();
    else
      fn.template operator()<vsa::SelectTiles<kPart, true, ByMass, AllowedTiles>>();
  };
  if (p.mass > 0)
    with_mass.template operator()<true>();
  else
    with_mass.template operator()<false>();
}

// fn.operator()<Kernel>() for the mask.
template <class Fn>
void with_masked_softmax(const MaskedSoftmaxRowsParams& p, Fn fn) {
  if (p.mask.has_runs())
    fn.template operator()<vsa::MaskedSoftmaxRows<AllowedRuns>>();
  else
    fn.template operator()<vsa::MaskedSoftmaxRows<AllowedTiles>>();
}

inline std::string make_params(MaskedSoftmaxRowsParams& p, const MaskedSoftmaxRows& call) {
  p.scores = call.scores;
  p.rows = call.rows;
  p.columns = call.columns;
  p.first_row = call.first_row;
  return make_mask(p.mask, call.mask, call.query_tiles, call.columns);
}

inline std::string check_sides(const MaskedProductParams& p, int product) {
  const auto& x = p.products[product];
  const int keys = p.sides[product] == Sides::RowsAndColumns ? x.columns
                   : p.sides[product] == Sides::RowsAndDepth ? x.depth
                                                             : x.rows;
  return keys == p.rule.num_key_tiles()
             ? ""
             : "a rule over tiles is for another number of key tiles than a product";
}

inline std::string make_params(MaskedProductParams& p, const MaskedProducts& call) {
  FloatProductParams& plain = p;
  if (const std::string error = make_params(plain, static_cast<const Products&>(call));
      !error.empty())
    return error;
  if (call.sides.size() != call.products.size()) return "each product has its sides";
  if (const std::string error = make_rule(p.rule, call.rule); !error.empty()) return error;
  p.first_query = call.first_query;
  for (size_t i = 0; i < call.sides.size(); ++i) {
    if (call.sides[i] < kRowsAndColumns || call.sides[i] > kDepthAndRows)
      return "sides of a product are 0, 1 or 2";
    p.sides[i] = static_cast<Sides>(call.sides[i]);
    if (const std::string error = check_sides(p, static_cast<int>(i)); !error.empty()) return error;
  }
  return "";
}

inline std::string make_params(MaskedProductParams& p, const MaskedScoreGradient& call) {
  FloatProductParams& plain = p;
  if (const std::string error = make_params(plain, static_cast<const ScoreGradient&>(call));
      !error.empty())
    return error;
  if (const std::string error = make_rule(p.rule, call.rule); !error.empty()) return error;
  p.first_query = call.first_query;
  p.sides[0] = Sides::RowsAndColumns;
  return check_sides(p, 0);
}

}  // namespace vsa::launch
