// SPDX-License-Identifier: Apache-2.0
// Products of fp32 matrices and the gradient of scores as plain functions: what Python passes, in;
// an error sentence, out.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace vsa::launch {

// Of matrices of one shape. Strides are in elements, and may be any.
struct MatrixView {
  float* data;
  int64_t matrix_stride, row_stride, column_stride;
};

// out = scale * left right^T, added to what is there with `accumulate`.
struct Product {
  MatrixView left, right, out;  // [rows, depth], [columns, depth], [rows, columns]
  int matrices, rows, columns, depth;
  float scale;
  bool accumulate;
};

// Up to three products that do not depend on each other, in one launch.
struct Products {
  std::vector<Product> products;
};

// Gradients of the scores whose softmax, times the values, was `outputs`.
struct ScoreGradient {
  MatrixView grad_outputs, outputs;  // [rows, depth]
  MatrixView values;                 // [columns, depth]
  MatrixView weights;                // [rows, columns], the softmax
  MatrixView out;                    // [rows, columns]
  int matrices, rows, columns, depth;
};

// Empty when all went well.
std::string multiply(const Products& call, int device, void* stream);
std::string multiply_emulated(const Products& call, int blocks, unsigned seed);
std::string score_gradient(const ScoreGradient& call, int device, void* stream);
std::string score_gradient_emulated(const ScoreGradient& call, int blocks, unsigned seed);

}  // namespace vsa::launch
