// SPDX-License-Identifier: Apache-2.0
// The softmax of rows of scores in place, one warp per row: the weights that a backward pass needs
// again, the same bits as the forward's.
#pragma once
#include "kernels/select/score_row.h"
#include "kernels/select/softmax_row.h"

namespace vsa {

struct SoftmaxRowsParams {
  float* scores;  // [rows, columns]
  int rows, columns;
};

struct MaskedSoftmaxRowsParams : SoftmaxRowsParams {
  TileMask mask;
  int first_row;  // number of the first row among all, [batch, heads, query_tiles]
};

struct SoftmaxRows {
  VSA_DEVICE static void run(const SoftmaxRowsParams& p, int row) {
    float* scores = p.scores + int64_t{row} * p.columns;
    // As whole numbers in the order of the floats. A score that is none is passed over.
    const int top = greatest([&](int lane) {
      float own = -INFINITY;
      for (int column = lane; column < p.columns; column += kWarpThreads)
        own = max2(own, scores[column]);
      return order_of(own);
    });
    SoftmaxRow::run(scores, scores, p.columns, of_order(top));
  }
};

// The same over the tiles that each row may choose.
struct MaskedSoftmaxRows {
  VSA_DEVICE static void run(const MaskedSoftmaxRowsParams& p, int row) {
    float* scores = p.scores + int64_t{row} * p.columns;
    const AllowedTiles allowed(p.mask, p.first_row + row);
    const int top = greatest([&](int lane) {
      float own = -INFINITY;
      for (int column = lane; column < p.columns; column += kWarpThreads)
        if (allowed.has(column)) own = max2(own, scores[column]);
      return order_of(own);
    });
    SoftmaxRow::run(scores, scores, p.columns, of_order(top),
                    [&](int column) { return allowed.has(column); });
  }
};

}  // namespace vsa
