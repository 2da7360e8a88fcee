// SPDX-License-Identifier: Apache-2.0
// What the forward kernel of the fine stage is told.
#pragma once
#include "kernels/schedule/work_list.h"

namespace vsa {

struct FineForwardParams {
  TokenTensor q, k, v, out;
  PaddableSequence queries, keys;
  const uint32_t* bitmap;  // [batch, heads, n_q, words] bitmap rows of the video's query tiles
  const int* query_axes;   // [batch, heads] along which query tiles are neighbours
  float* lse;              // [batch, heads, S_q] natural logarithm
  int batch, heads, kv_heads;
  float scale;        // of the scores, times log2(e)
  int* tile_counter;  // work tiles that blocks have taken: 0 at the start
  GroupOrder order;   // of the query tiles
};

}  // namespace vsa
