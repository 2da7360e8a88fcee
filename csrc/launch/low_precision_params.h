// SPDX-License-Identifier: Apache-2.0
// From calls to kernel parameters and the kernels that they need, the same for both machines.
#pragma once
#include <algorithm>
#include <cstdint>

#include "kernels/coarse/quantise_tiles.h"
#include "kernels/fine/low_precision_forward.h"
#include "launch/fine_params.h"
#include "launch/low_precision.h"

namespace vsa::launch {

static_assert(sizeof(HeadRecord<64>) == 64 * kRecordBytes &&
              sizeof(HeadRecord<128>) == 128 * kRecordBytes);

inline std::string make_params(QuantiseTilesParams& p, const ChannelStatistics& call) {
  const auto tokens = [](const TokenView& x) {
    return TokensToQuantise{x.data, x.batch_stride, x.head_stride,
                            static_cast<int>(x.token_stride)};
  };
  for (const TokenView* x : {&call.k, &call.v}) {
    const int64_t strides = x->token_stride | (call.batch > 1 ? x->batch_stride : 0) |
                            (call.heads > 1 ? x->head_stride : 0);
    if (strides % kChunkElements != 0 || reinterpret_cast<uintptr_t>(x->data) % kChunkBytes != 0)
      return "keys and values that become eight bits must be aligned to 16 bytes, token by token";
    if (x->token_stride > INT32_MAX)
      return "keys and values that become eight bits must have less than 2^31 elements from token "
             "to token";
  }
  p.k = tokens(call.k);
  p.v = tokens(call.v);
  p.keys = tiled(call.grid, call.text_rows);
  p.batch = call.batch;
  p.heads = call.heads;
  // As many warps as a GPU has at a time, and so few atomics.
  constexpr int64_t kWarps = 132 * 24, kMostTogether = 16;
  const int64_t tiles = int64_t{call.batch} * call.heads * p.keys.num_tiles();
  p.together =
      static_cast<int>(std::clamp<int64_t>((tiles + kWarps - 1) / kWarps, 1, kMostTogether));
  p.records = call.records;
  return "";
}
inline std::string make_params(QuantiseTilesParams& p, const QuantiseTiles& call) {
  p.channels = call.channels;
  p.images = static_cast<unsigned char*>(call.images);
  return make_params(p, static_cast<const ChannelStatistics&>(call));
}

inline size_t record_bytes(const ChannelStatistics& call) {
  return size_t{kRecordBytes} * call.batch * call.heads * call.head_dim;
}

// fn(kernel) for the configuration of a call; false if there are no kernels.
template <class Fn>
bool with_statistics(const ChannelStatistics& call, Fn fn) {
  return with_config(call, [&](auto element, auto head_dim) {
    fn(vsa::ChannelStatistics<decltype(element), head_dim()>{});
  });
}
template <class Fn>
bool with_quantisation(const QuantiseTiles& call, Fn fn) {
  return with_config(call, [&](auto element, auto head_dim) {
    using Element = decltype(element);
    constexpr int D = head_dim();
    if (call.fp8)
      fn(vsa::QuantiseTiles<Element, D, E4m3>{});
    else
      fn(vsa::QuantiseTiles<Element, D, S8>{});
  });
}

// fn(config of the forward) for a call; false if there are no kernels.
template <class Fn>
bool with_low_precision(const LowPrecisionForward& call, Fn fn) {
  return with_config(call, [&](auto element, auto head_dim) {
    using Element = decltype(element);
    constexpr int D = head_dim();
    if (call.fp8)
      fn(LowPrecisionForwardConfig<Element, D, E4m3>{});
    else
      fn(LowPrecisionForwardConfig<Element, D, S8>{});
  });
}

template <class Base, class Encode>
std::string make_params(LowPrecisionParams<Base>& p,
                        const LowPrecisionForward& call,
                        Encode encode) {
  p.images = static_cast<const unsigned char*>(call.images);
  p.channels = call.channels;
  return make_params(static_cast<Base&>(p), static_cast<const FineForward&>(call), encode);
}

}  // namespace vsa::launch
