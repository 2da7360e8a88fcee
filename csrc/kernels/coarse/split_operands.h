// SPDX-License-Identifier: Apache-2.0
// The operands of a product of fp32 matrices, left * right^T, as bf16 matrices six times as deep,
// whose product tensor cores make. An fp32 number is the sum of three in bf16, high + middle + low;
// of their nine products the three smallest are below the last bit of an fp32 product.
//
//   left    low   middle  high    middle  high    high
//   right   high  middle  low     high    middle  high
//
// Small products come first, so that sums are short where they are large.
#pragma once
#include "prim/warp.h"

namespace vsa {

struct SplitOperandsParams {
  static constexpr int kPieces = 6;

  struct Operand {
    const float* values;  // [rows, depth]
    uint16_t* pieces;     // [rows, 6, depth] bf16
    int count;            // of values
  };
  Operand operands[2];  // left, right
  int depth;
  float scale;  // of the left operand
};

// One value, by one lane.
struct SplitOperands {
  VSA_DEVICE static void run(const SplitOperandsParams& p, int operand, int i) {
    const SplitOperandsParams::Operand& x = p.operands[operand];
    const bool left = operand == 0;
    write(load_global(x.values + i) * (left ? p.scale : 1.f), left, x.pieces, p.depth, i);
  }

  // value: the i-th of the matrix
  VSA_DEVICE static void write(float value, bool left, uint16_t* pieces, int depth, int64_t i) {
    float rest = value;
    uint16_t parts[3];  // high, middle, low
    VSA_UNROLL
    for (uint16_t& part : parts) {
      part = static_cast<uint16_t>(pack<Bf16>(rest, 0.f));
      rest -= widen_low<Bf16>(part);
    }
    const uint16_t high = parts[0], middle = parts[1], low = parts[2];
    const uint16_t in_order[] = {left ? low : high,    middle,
                                 left ? high : low,    left ? middle : high,
                                 left ? high : middle, high};
    uint16_t* to = pieces + i / depth * SplitOperandsParams::kPieces * depth + i % depth;
    VSA_UNROLL
    for (int piece = 0; piece < SplitOperandsParams::kPieces; ++piece)
      to[piece * depth] = in_order[piece];
  }
};

}  // namespace vsa
