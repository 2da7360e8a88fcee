// SPDX-License-Identifier: Apache-2.0
// From calls to kernel parameters and the kernels that they need, the same for both machines.
#pragma once
#include <algorithm>

#include "kernels/coarse/tile_means.h"
#include "kernels/select/select_tiles.h"
#include "kernels/select/softmax_rows.h"
#include "launch/coarse_select.h"
#include "launch/element.h"

namespace vsa::launch {

constexpr int kVectorBytes = 16;

inline int element_bytes(Dtype dtype) { return dtype == Dtype::Fp32 ? 4 : 2; }

// Elements that a lane loads at a time: 16 bytes where every address allows it, else one.
inline int vector_elements(const TileMeans& call) {
  const int bytes = element_bytes(call.dtype);
  const auto aligned = [&](int64_t elements) { return elements * bytes % kVectorBytes == 0; };
  for (const MeanTensor& tensor : call.tensors) {
    const TokenView& x = tensor.tokens;
    const bool wide = aligned(call.head_dim) && aligned(x.token_stride) &&
                      (call.batch == 1 || aligned(x.batch_stride)) &&
                      (tensor.heads == 1 || aligned(x.head_stride)) &&
                      reinterpret_cast<uintptr_t>(x.data) % kVectorBytes == 0;
    if (!wide) return 1;
  }
  return kVectorBytes / bytes;
}

inline std::string make_params(TileMeansParams& p, const TileMeans& call) {
  if (call.tensors.empty() || call.tensors.size() > TileMeansParams::kMost)
    return "tile means are taken of one to three tensors at a time";
  p.head_dim = call.head_dim;
  p.count = 0;
  for (const MeanTensor& tensor : call.tensors) {
    TokensToMean& to = p.tensors[p.count++];
    const TokenView& x = tensor.tokens;
    to.data = x.data;
    to.batch_stride = x.batch_stride;
    to.token_stride = x.token_stride;
    to.head_stride = x.head_stride;
    to.grid = tensor.grid;
    to.sizes = {tensor.sizes};
    for (int row = 0; row < kTileRows; ++row) {
      const Axes at = row_offset(tensor.grid.tile, row), size = tensor.grid.video;
      const bool inside = row < tensor.grid.tile.volume();
      to.row_offsets[row] = inside ? ((at.t * size.h + at.h) * size.w + at.w) * x.token_stride : 0;
    }
    to.heads = tensor.heads;
    to.means = tensor.means;
    const int64_t in_batch = int64_t{tensor.grid.num_tiles()} * tensor.heads * call.head_dim;
    if (in_batch > INT_MAX) return "the means of a batch element are more than 31 bits can number";
    to.lanes = call.batch * in_batch / vector_elements(call);
  }
  return "";
}

// fn(vsa::TileMeans) for the element and the width of its loads.
template <class Fn>
void with_means(const TileMeans& call, Fn fn) {
  with_element(call.dtype, MeanDtypes{}, [&](auto element) {
    using Element = decltype(element);
    constexpr int kVector = kVectorBytes / (std::is_same_v<Element, float> ? 4 : 2);
    if (vector_elements(call) > 1)
      fn(vsa::TileMeans<Element, kVector>{});
    else
      fn(vsa::TileMeans<Element, 1>{});
  });
}

inline std::string make_params(SelectTilesParams& p, const SelectTiles& call) {
  static_assert(SelectTilesParams::kMostCounts == kMostHeadBudgets);
  if (call.counts.empty() || call.counts.size() > kMostHeadBudgets)
    return "up to " + std::to_string(kMostHeadBudgets) + " heads can have budgets of their own";
  if (call.oldest != nullptr && call.must != nullptr)
    return "no tiles are forced where columns are slots of a ring";
  p.scores = call.scores;
  p.must = call.must;
  p.bitmap = call.bitmap;
  p.weights = call.weights;
  p.first_row = call.first_row;
  p.rows = call.rows;
  p.columns = call.columns;
  p.query_tiles = call.query_tiles;
  p.mass = call.mass;
  p.order = {call.oldest, call.ring, call.per_slot};
  p.num_counts = static_cast<int>(call.counts.size());
  std::transform(call.counts.begin(), call.counts.end(), p.counts,
                 [&](int count) { return std::min(count, call.columns); });
  return "";
}

// fn.operator()<vsa::SelectTiles>() for the length of a row: short rows stay in registers.
template <class Fn>
void with_selection(const SelectTiles& call, Fn fn) {
  constexpr int kShort = 64, kPart = 32;  // scores per lane: at most, and of longer rows at a time
  const auto with_mass = [&]<bool ByMass>() {
    const auto with_held = [&]<int Held>(const auto& self) {
      using Kernel = vsa::SelectTiles<Held, false, ByMass>;
      if (call.columns <= Kernel::Row::kColumns)
        fn.template operator()<Kernel>();
      else if constexpr (Held < kShort)
        self.template operator()<Held + Kernel::Row::kStep>(self);
      else
        fn.template operator()<vsa::SelectTiles<kPart, true, ByMass>>();
    };
    with_held.template operator()<8>(with_held);
  };
  if (call.mass > 0)
    with_mass.template operator()<true>();
  else
    with_mass.template operator()<false>();
}

}  // namespace vsa::launch
