// SPDX-License-Identifier: Apache-2.0
// From calls to parameters of the kernel of fp32 products, the same for both machines.
#pragma once
#include <climits>
#include <string>

#include "kernels/coarse/float_product.h"
#include "launch/float_product.h"

namespace vsa::launch {

inline FloatMatrix matrix_of(const MatrixView& x, int matrices, int rows, int columns) {
  const auto even = [](int64_t elements) { return elements % 2 == 0; };
  const bool pairs = x.column_stride == 1 && even(columns) && (rows == 1 || even(x.row_stride)) &&
                     (matrices == 1 || even(x.matrix_stride)) &&
                     reinterpret_cast<uintptr_t>(x.data) % sizeof(FloatPair) == 0;
  return {x.data, x.matrix_stride, x.row_stride, x.column_stride, pairs};
}

// Adds the blocks of a product to those before it, for all matrices.
inline std::string count_blocks(FloatProductParams::Product& to, int matrices, int before) {
  const int64_t tiles = int64_t{to.row_tiles()} * to.column_tiles();
  if (tiles > INT_MAX || tiles * matrices + before > INT_MAX)
    return "a product has more tiles than 31 bits can number";
  to.blocks = before + static_cast<int>(tiles * matrices);
  return "";
}

inline std::string make_params(FloatProductParams& p, const Products& call) {
  if (call.products.empty() || call.products.size() > FloatProductParams::kMost)
    return "one to three products are made at a time";
  int before = 0;
  for (size_t i = 0; i < call.products.size(); ++i) {
    const Product& x = call.products[i];
    FloatProductParams::Product& to = p.products[i];
    to.left = matrix_of(x.left, x.matrices, x.rows, x.depth);
    to.right = matrix_of(x.right, x.matrices, x.columns, x.depth);
    to.out = matrix_of(x.out, x.matrices, x.rows, x.columns);
    to.rows = x.rows;
    to.columns = x.columns;
    to.depth = x.depth;
    to.scale = x.scale;
    to.accumulate = x.accumulate;
    if (const std::string error = count_blocks(to, x.matrices, before); !error.empty())
      return error;
    before = to.blocks;
  }
  return "";
}

inline std::string make_params(FloatProductParams& p, const ScoreGradient& call) {
  FloatProductParams::Product& to = p.products[0];
  to.left = matrix_of(call.grad_outputs, call.matrices, call.rows, call.depth);
  to.outputs = matrix_of(call.outputs, call.matrices, call.rows, call.depth);
  to.right = matrix_of(call.values, call.matrices, call.columns, call.depth);
  to.weights = matrix_of(call.weights, call.matrices, call.rows, call.columns);
  to.out = matrix_of(call.out, call.matrices, call.rows, call.columns);
  to.rows = call.rows;
  to.columns = call.columns;
  to.depth = call.depth;
  return count_blocks(to, call.matrices, 0);
}

inline int num_blocks(const Products& call, const FloatProductParams& p) {
  return p.products[call.products.size() - 1].blocks;
}
inline int num_blocks(const ScoreGradient&, const FloatProductParams& p) {
  return p.products[0].blocks;
}

}  // namespace vsa::launch
