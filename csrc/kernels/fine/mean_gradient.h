// SPDX-License-Identifier: Apache-2.0
// The gradient of tile means, added where the gradients of the tokens are rounded and stored: each
// token of a tile gets an equal share of its mean's.
#pragma once
#include "kernels/schedule/work_list.h"
#include "tile/fragment.h"

namespace vsa {

struct MeanGradient {
  const float* rows;  // [batch, heads, tiles of the video, head_dim]; null: there is none

  template <int D, class Sequence>
  VSA_DEVICE void add_to(Fragment<D>& grad,
                         const Sequence& sequence,
                         int heads,
                         const Assignment& work,
                         const TilePlace& at) const {
    if (rows == nullptr || at.region != Region::Video) return;
    const int64_t of_head = int64_t{work.batch} * heads + work.head;
    const float* row = rows + (of_head * sequence.grid.num_tiles() + work.tile) * D;
    const float share = 1.f / static_cast<float>(popcount(sequence.rows(at, work.batch)));
    for_each(grad,
             [=](float& x, int, int channel) { x = fma(load_global(row + channel), share, x); });
  }
};

}  // namespace vsa
