// SPDX-License-Identifier: Apache-2.0
// The kernels of the fine stage on the emulator: the blocks of a persistent grid, one after the
// other.
#include <algorithm>
#include <numeric>

#include "launch/emulated_blocks.h"
#include "launch/emulated_map.h"
#include "launch/fine_params.h"

namespace vsa::launch {
namespace {

template <class Epilogue>
std::string emulate_forward(const FineForward& call, int blocks, unsigned seed) {
  typename Epilogue::Params params;
  if (const std::string error = make_params(params, call, encode_for_emulator); !error.empty())
    return error;
  return with_hazards(call, [&](auto element, auto head_dim) {
    using Config = FineForwardConfig<decltype(element), head_dim()>;
    run_blocks<vsa::FineForward<Config, Epilogue>>(params, blocks, seed);
  });
}

// fn(place, batch element, head, tile) for all tiles of a sequence
template <class Fn>
void for_each_tile(const TiledSequence& sequence, int batch, int heads, Fn fn) {
  for (int b = 0; b < batch; ++b)
    for (int head = 0; head < heads; ++head)
      for (int tile = 0; tile < sequence.num_tiles(); ++tile)
        fn(sequence.place(tile), b, head, tile);
}

template <class Element, int D, bool Gated>
void run_backward_rows(const BackwardRowsParams& p, int batch) {
  using Rows = BackwardRows<Element, D, Gated>;
  constexpr int kLanes = TokenLanes<D>::kLanes;
  for_each_tile(p.queries, batch, p.heads, [&](const TilePlace& at, int b, int head, int tile) {
    const typename Rows::HeadTile of(p, b, head, tile);
    Rows::clear_sums(p, of, 0, 1);
    Channels sums[kLanes] = {};
    for (int row = 0; row < kTileRows; ++row) {
      // The last lane stores the sum of all.
      float delta = 0;
      for (int lane = 0; lane < kLanes; ++lane)
        Rows::row(p, of, row, lane * kChunkElements, sums[lane],
                  [&](float x) { return delta += x; });
    }
    if (p.gate_coarse.data == nullptr || at.region != Region::Video) return;
    const int64_t of_head = int64_t{b} * p.heads + head;
    float* to = p.grad_coarse + (of_head * p.queries.grid.num_tiles() + tile) * D;
    for (int i = 0; i < D; ++i) to[i] = sums[i / kChunkElements].x[i % kChunkElements];
  });
}

template <class Element, int D>
void run_two_passes(const FineBackwardParams& params, int blocks, unsigned seed) {
  run_blocks<FineBackwardKeys<FineBackwardKeysConfig<Element, D>>>(params, blocks, seed);
  run_blocks<FineBackwardQueries<FineBackwardQueriesConfig<Element, D>>>(params, blocks, seed);
}

template <class Element>
void run_one_pass(const FineBackward& call,
                  const FineBackwardParams& params,
                  int blocks,
                  unsigned seed) {
  run_blocks<FineBackwardKeys<FineBackwardOnePassConfig<Element, 64>>>(params, blocks, seed);
  const RoundSumsParams p = round_sums_params(call, params);
  for_each_tile(params.queries, call.batch, call.heads,
                [&](const TilePlace&, int b, int head, int tile) {
                  for (int thread = 0; thread < RoundSums<Element>::kThreads; ++thread)
                    RoundSums<Element>::rows(p, b, head, tile, thread);
                });
}

}  // namespace

std::string fine_forward_emulated(const FineForward& call, int blocks, unsigned seed) {
  return any(call.gates) ? emulate_forward<GatedOutput>(call, blocks, seed)
                         : emulate_forward<PlainOutput>(call, blocks, seed);
}

std::string backward_rows_emulated(const FineBackward& call) {
  if (std::string refused = refused_one_pass(call); !refused.empty()) return refused;
  return with_hazards(call, [&](auto element, auto head_dim) {
    using Element = decltype(element);
    const auto run = any(call.gates) ? run_backward_rows<Element, head_dim(), true>
                                     : run_backward_rows<Element, head_dim(), false>;
    run(backward_rows_params(call), call.batch);
  });
}

std::string fine_backward_emulated(const FineBackward& call, int blocks, unsigned seed) {
  FineBackwardParams params;
  if (const std::string error = make_params(params, call, encode_for_emulator); !error.empty())
    return error;
  return with_hazards(call, [&](auto element, auto head_dim) {
    using Element = decltype(element);
    constexpr int D = head_dim();
    if constexpr (D == 64)
      if (call.grad_q_sums != nullptr) return run_one_pass<Element>(call, params, blocks, seed);
    run_two_passes<Element, D>(params, blocks, seed);
  });
}

std::string transpose_bitmaps_emulated(const BitmapTranspose& call) {
  const int64_t to_words = bitmap::words(call.rows);
  for (int64_t i = 0; i < call.bitmaps; ++i) {
    uint32_t* to = call.target + i * call.columns * to_words;
    bitmap::transpose(call.source + i * call.rows * bitmap::words(call.columns), call.rows,
                      call.columns, to);
    for (int column = 0; column < call.columns; ++column)
      call.counts[i * call.columns + column] = bitmap::count(to + column * to_words, call.rows);
  }
  return "";
}

std::string choose_axes_emulated(const AxisChoice& call) {
  std::fill_n(call.counters, call.count, 0);
  for (int group = 0; group < call.batch * call.groups; ++group) {
    AxisChoice::Answer all = {};
    for (int sample = 0; sample < AxisChoice::kSamples; ++sample) {
      AxisChoice::Sample found;
      for (int i = 0; i < call.sharing(); ++i)
        for (int word = 0; word < call.words; ++word)
          found.add(call.look(group * call.sharing() + i, sample, word));
      const AxisChoice::Answer answer = call.answer(found, sample);
      all.along_t += answer.along_t;
      all.backwards += answer.backwards;
    }
    call.axes[group] = call.axis(all);
  }
  return "";
}

std::string sort_groups_emulated(const GroupSort& call) {
  const int groups = call.groups();
  for (int head = 0; head < call.batch * call.head_groups; ++head) {
    int* order = call.order + int64_t{head} * groups;
    std::iota(order, order + groups, 0);
    std::stable_sort(order, order + groups,
                     [&](int a, int b) { return call.length(head, a) > call.length(head, b); });
    GroupSort::Sum all;
    for (int group = 0; group < groups; ++group) all.add(call.length(head, group));
    const auto is_long = [&](int group) {
      return GroupSort::is_long(call.length(head, group), all);
    };
    const auto found = static_cast<int>(std::count_if(order, order + groups, is_long));
    *call.long_ones = std::max(*call.long_ones, call.first_groups(found));
  }
  return "";
}

}  // namespace vsa::launch
