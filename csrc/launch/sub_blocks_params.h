// SPDX-License-Identifier: Apache-2.0
// From calls to parameters of the kernels of runs, the same for both machines.
#pragma once
#include <algorithm>
#include <climits>
#include <type_traits>

#include "kernels/coarse/run_means.h"
#include "kernels/coarse/sub_block_scores.h"
#include "launch/element.h"
#include "launch/sub_blocks.h"

namespace vsa::launch {

// fn(std::integral_constant) for a value of the list.
template <class Fn, int... values>
void with_value(int value, Values<values...>, Fn fn) {
  static_cast<void>(
      ((value == values && (fn(std::integral_constant<int, values>{}), true)) || ...));
}

// Whether lanes load their channels at once: where every address allows it.
inline bool loads_are_wide(const RunMeans& call) {
  const int bytes = call.head_dim / kWarpThreads * kElementBytes;
  const auto aligned = [&](int64_t elements) { return elements * kElementBytes % bytes == 0; };
  return std::all_of(call.tensors.begin(), call.tensors.end(), [&](const RunTensor& tensor) {
    const TokenView& x = tensor.tokens;
    return aligned(x.token_stride) && (call.batch == 1 || aligned(x.batch_stride)) &&
           (tensor.heads == 1 || aligned(x.head_stride)) &&
           reinterpret_cast<uintptr_t>(x.data) % static_cast<unsigned>(bytes) == 0;
  });
}

inline std::string make_params(RunMeansParams& p, const RunMeans& call) {
  if (call.tensors.empty() || call.tensors.size() > RunMeansParams::kMost)
    return "means of runs are taken of one to three tensors at a time";
  if (call.runs > call.slots) return "a tile has more runs than slots for them";
  p.runs = call.runs;
  p.slots = call.slots;
  p.count = 0;
  for (const RunTensor& tensor : call.tensors) {
    TokensToRuns& to = p.tensors[p.count++];
    const TokenView& x = tensor.tokens;
    to.data = x.data;
    to.batch_stride = x.batch_stride;
    to.token_stride = x.token_stride;
    to.head_stride = x.head_stride;
    to.grid = tensor.grid;
    for (int row = 0; row < kTileRows; ++row) {
      const Axes at = row_offset(tensor.grid.tile, row), size = tensor.grid.video;
      const bool inside = row < tensor.grid.tile.volume();
      to.row_offsets[row] = inside ? ((at.t * size.h + at.h) * size.w + at.w) * x.token_stride : 0;
    }
    to.heads = tensor.heads;
    to.means = tensor.means;
    to.rows = tensor.rows;
    to.factors = tensor.factors;
    to.are_keys = tensor.are_keys;
    if ((tensor.rows == nullptr) != (tensor.factors == nullptr))
      return "rows of runs and their factors come together";
    to.warps = int64_t{call.batch} * tensor.heads * tensor.grid.num_tiles();
    if (to.warps > INT_MAX) return "a tensor has more tiles than 31 bits can number";
  }
  return "";
}

// fn(vsa::RunMeans) for the element, head_dim and the width of its loads.
template <class Fn>
void with_run_means(const RunMeans& call, Fn fn) {
  with_element(call.dtype, FineDtypes{}, [&](auto element) {
    using Element = decltype(element);
    with_value(call.head_dim, FineHeadDims{}, [&](auto head_dim) {
      constexpr int D = decltype(head_dim)::value;
      if (loads_are_wide(call))
        fn(static_cast<vsa::RunMeans<Element, D, true>*>(nullptr));
      else
        fn(static_cast<vsa::RunMeans<Element, D, false>*>(nullptr));
    });
  });
}

// Parts that the keys of a group of rows are shared out in, where there are few groups: as many as
// give all multiprocessors of an H100 or H200 something to do, each several steps.
constexpr int kEnoughBlocks = 120, kLeastSteps = 4;

template <class Kernel>
std::string make_params(SubBlockScoresParams& p, const SubBlockScores& call) {
  p.queries = call.queries;
  p.query_factors = call.query_factors;
  p.keys = call.keys;
  p.key_factors = call.key_factors;
  p.scores = call.scores;
  p.rows = call.rows;
  p.columns = call.columns;
  p.scale = call.scale;
  if (call.scale == 0) return "scores of runs need a scale that is not zero";
  p.row_groups = ceil_div(call.rows, Kernel::kRowTiles * Kernel::kConsumers);
  const int steps = runs::key_blocks(call.columns, call.slots);
  const int64_t groups = int64_t{call.matrices} * p.row_groups;
  const int wanted = groups < kEnoughBlocks ? static_cast<int>(kEnoughBlocks / groups) : 1;
  const int each = ceil_div(steps, std::clamp(wanted, 1, ceil_div(steps, kLeastSteps)));
  p.parts = ceil_div(steps, each);
  if (groups * p.parts > INT_MAX) return "scores have more blocks than 31 bits can number";
  return "";
}

inline int num_blocks(const SubBlockScores& call, const SubBlockScoresParams& p) {
  return call.matrices * p.row_groups * p.parts;
}

// fn.operator()<vsa::SubBlockScores>() for head_dim and slots. Only full quads are worth a kernel
// without empty slots.
template <class Fn>
void with_sub_block_scores(const SubBlockScores& call, Fn fn) {
  with_value(call.head_dim, FineHeadDims{}, [&](auto head_dim) {
    constexpr int D = decltype(head_dim)::value;
    with_value(call.slots, RunSlots{}, [&](auto slots) {
      constexpr int kQuads = decltype(slots)::value / runs::kQuad;
      if (kQuads > 1 || call.has_empty)
        fn.template operator()<vsa::SubBlockScores<D, kQuads, true>>();
      else
        fn.template operator()<vsa::SubBlockScores<D, 1, false>>();
    });
  });
}

}  // namespace vsa::launch
