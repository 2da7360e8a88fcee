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
    run(p, row, AllColumns{p.columns});
  }

  template <class Allowed>
  VSA_DEVICE static void run(const SoftmaxRowsParams& p, int row, const Allowed& allowed) {
    float* scores = p.scores + int64_t{row} * p.columns;
    SoftmaxRow::run(scores, scores, SoftmaxRow::greatest_of(scores, allowed), allowed);
  }
};

// The same over the tiles that each row may choose: AllowedRuns or AllowedTiles.
template <class Allowed>
struct MaskedSoftmaxRows {
  VSA_DEVICE static void run(const MaskedSoftmaxRowsParams& p, int row) {
    SoftmaxRows::run(p, row, Allowed(p.mask, p.first_row + row));
  }
};

}  // namespace vsa
