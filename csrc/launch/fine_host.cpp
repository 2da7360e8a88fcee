// SPDX-License-Identifier: Apache-2.0
// The kernels of the fine stage on the emulator: the blocks of a persistent grid, one after the
// other.
#include <exception>

#include "launch/fine_params.h"
#include "prim/host_block.h"

namespace vsa::launch {
namespace {

std::string encode(TensorMap& map, const MapArguments& a) {
  map = {a.base, {}, {}, {}};
  std::copy(std::begin(a.dims), std::end(a.dims), map.dims);
  std::copy(std::begin(a.strides), std::end(a.strides), map.strides);
  std::copy(std::begin(a.box), std::end(a.box), map.box);
  return "";
}

template <class Kernel>
void run_blocks(const typename Kernel::Params& params, int blocks, unsigned seed) {
  for (int block = 0; block < blocks; ++block)
    host::run_block<Kernel>(params, block, blocks, seed + block);
}

// fn(Element{}, head_dim), with the hazards that it throws as sentences
template <class Call, class Fn>
std::string with_hazards(const Call& call, Fn fn) {
  try {
    return with_config(call, fn) ? "" : kNoConfig;
  } catch (const std::exception& hazard) {
    return hazard.what();
  }
}

template <class Element, int D>
void write_all_row_stats(const RowStatsParams& params, int batch) {
  for (int b = 0; b < batch; ++b)
    for (int head = 0; head < params.heads; ++head)
      for (int tile = 0; tile < params.queries.num_tiles(); ++tile)
        for (int row = 0; row < kTileRows; ++row)
          write_row_stats<Element, D>(params, b, head, tile, row, [](auto part) {
            float sum = 0;
            for (int lane = 0; lane < kWarpThreads; ++lane) sum += part(lane);
            return sum;
          });
}

}  // namespace

std::string fine_forward_emulated(const FineForward& call, int blocks, unsigned seed) {
  FineForwardParams params;
  if (const std::string error = make_params(params, call, encode); !error.empty()) return error;
  return with_hazards(call, [&](auto element, auto head_dim) {
    using Config = FineForwardConfig<decltype(element), head_dim()>;
    run_blocks<vsa::FineForward<Config>>(params, blocks, seed);
  });
}

std::string fine_backward_emulated(const FineBackward& call, int blocks, unsigned seed) {
  FineBackwardParams params;
  if (const std::string error = make_params(params, call, encode); !error.empty()) return error;
  return with_hazards(call, [&](auto element, auto head_dim) {
    using Element = decltype(element);
    constexpr int D = head_dim();
    write_all_row_stats<Element, D>(row_stats_params(call), call.batch);
    *call.tickets = 0;
    run_blocks<FineBackwardKeys<FineBackwardKeysConfig<Element, D>>>(params, blocks, seed);
    run_blocks<FineBackwardQueries<FineBackwardQueriesConfig<Element, D>>>(params, blocks, seed);
  });
}

std::string transpose_bitmaps_on_host(const BitmapTranspose& call) {
  const int64_t to_words = bitmap::words(call.rows);
  for (int64_t i = 0; i < call.bitmaps; ++i) {
    uint32_t* to = call.to + i * call.columns * to_words;
    bitmap::transpose(call.from + i * call.rows * bitmap::words(call.columns), call.rows,
                      call.columns, to);
    for (int column = 0; column < call.columns; ++column)
      call.counts[i * call.columns + column] = bitmap::count(to + column * to_words, call.rows);
  }
  return "";
}

}  // namespace vsa::launch
