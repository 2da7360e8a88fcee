// SPDX-License-Identifier: Apache-2.0
// Products of fp32 matrices in vsa._C: which fields each call has, and what runs it.
#include "launch/float_product.h"

#include "bind/fields.h"

namespace vsa::bind {

void bind_float_product(py::module_& m) {
  using launch::Product, launch::Products, launch::ScoreGradient;
  bind_struct<Product>(m, kClass<Product>,
                       "One of a launch: out = scale * left @ right.mT, or added to out.",
                       {VSA_FIELD(Product, left, NotNull), VSA_FIELD(Product, right, NotNull),
                        VSA_FIELD(Product, out, NotNull), VSA_FIELD(Product, matrices, Positive),
                        VSA_FIELD(Product, rows, Positive), VSA_FIELD(Product, columns, Positive),
                        VSA_FIELD(Product, depth, Positive), VSA_FIELD(Product, scale),
                        VSA_FIELD(Product, accumulate)});
  auto products = bind_struct<Products>(m, "Products", "Up to three products of fp32 matrices.",
                                        {VSA_FIELD(Products, products)});
  bind_run<launch::multiply, launch::multiply_emulated>(products);
  using Call = ScoreGradient;
  auto gradient = bind_struct<Call>(
      m, "ScoreGradient",
      "out = weights * (grad_outputs @ values.mT - (grad_outputs * outputs).sum(-1, True)).",
      {VSA_FIELD(Call, grad_outputs, NotNull), VSA_FIELD(Call, outputs, NotNull),
       VSA_FIELD(Call, values, NotNull), VSA_FIELD(Call, weights, NotNull),
       VSA_FIELD(Call, out, NotNull), VSA_FIELD(Call, matrices, Positive),
       VSA_FIELD(Call, rows, Positive), VSA_FIELD(Call, columns, Positive),
       VSA_FIELD(Call, depth, Positive)});
  bind_run<launch::score_gradient, launch::score_gradient_emulated>(gradient);
}

}  // namespace vsa::bind
