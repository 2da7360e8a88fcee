// SPDX-License-Identifier: Apache-2.0
// From a call to kernel parameters, the same for both machines.
#pragma once
#include "kernels/fine/clean_text.h"
#include "launch/clean_text.h"

namespace vsa::launch {

inline std::string make_params(CleanTextParams& p, const CleanText& call) {
  if (call.tensors.size() > CleanTextParams::kMost)
    return "the text of up to four tensors is copied at a time";
  if (call.head_dim % kChunkElements != 0)
    return "text is copied 16 bytes at a time, which a head must be a multiple of";
  p.valid = call.valid;
  p.batch_stride = call.valid_batch_stride;
  p.token_stride = call.valid_token_stride;
  p.prefix = call.prefix;
  p.suffix = call.suffix;
  p.rows = reinterpret_cast<uint8_t*>(call.rows);
  const int tiles = ceil_div(call.prefix, kTileRows) + ceil_div(call.suffix, kTileRows);
  p.row_lanes = int64_t{call.batch} * tiles * vsa::CleanText::kBytesOfRows;
  p.head_dim = call.head_dim;
  p.count = 0;
  for (const TextTensor& tensor : call.tensors) {
    const TokenView& x = tensor.tokens;
    const int64_t in_batch = int64_t{call.prefix + call.suffix} * tensor.heads * call.head_dim;
    if (in_batch > INT_MAX) return "the text of a batch element is more than 31 bits can number";
    p.tensors[p.count++] = {
        {static_cast<const uint16_t*>(x.data), x.batch_stride, x.token_stride, x.head_stride},
        static_cast<Chunk*>(tensor.clean),
        tensor.heads,
        tensor.length - call.suffix,
        call.batch * in_batch / kChunkElements};
  }
  return "";
}

}  // namespace vsa::launch
