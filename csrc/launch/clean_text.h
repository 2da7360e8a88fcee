// SPDX-License-Identifier: Apache-2.0
// Text ahead of the fine kernels as a plain function: what Python passes, in; an error sentence,
// out.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "launch/fine.h"

namespace vsa::launch {

struct TextTensor {
  TokenView tokens;  // of 16-bit elements, the video included
  int length, heads;
  void* clean;  // [batch, prefix + suffix, heads, head_dim]
};

struct CleanText {
  const uint8_t* valid;  // [batch, prefix + suffix] 1 for real tokens; null: all are
  int64_t valid_batch_stride, valid_token_stride;
  int batch, prefix, suffix, head_dim;
  uint64_t* rows;                   // [batch, text tiles], a bit for each row that is a real token
  std::vector<TextTensor> tensors;  // up to four, whose text is copied
};

// Empty when all went well.
std::string clean_text(const CleanText& call, int device, void* stream);
std::string clean_text_emulated(const CleanText& call);

}  // namespace vsa::launch
