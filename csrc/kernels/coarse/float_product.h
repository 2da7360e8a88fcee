// SPDX-License-Identifier: Apache-2.0
// Products of fp32 matrices on tensor cores, as exact as in fp32, for matrices with any strides.
//
//   out(m, n) = scale * sum_k left(m, k) right(n, k)  (+ out(m, n))
//
// or, for the gradient of the coarse attention's scores, with the weights P and the outputs O,
//
//   out(m, n) = P(m, n) * (sum_k left(m, k) right(n, k) - sum_k left(m, k) O(m, k))
//
// whose second sum is one number per row, delta.
//
// An fp32 number is the sum of three in bf16, high + middle + low; of their nine products the three
// smallest are below the last bit of an fp32 product:
//
//   left    low   middle  high    middle  high    high
//   right   high  middle  low     high    middle  high
//
// Small products come first, so that sums are short where they are large. Tensor cores cut off what
// they add up, so 64 elements are summed there and such sums are added as floats, which rounds.
//
// A block is one warpgroup and makes 64 x 64 of a matrix, in steps of 64 along k:
//
//   values of the next step    global memory -> registers   \ while the products
//   pieces of right            -> the other three tiles     / of this step run
//   pieces of left             -> registers, once those are done
//
// Under a mask over tiles, one side of a product stands for query tiles and another for key tiles.
// What lies between tiles of which none may choose the other is left out: blocks of the scores and
// of their gradient, which nobody reads then, and steps along k of the products that read those.
//
// Barriers: one meeting per step. Before it lie the stores to the tiles that the products of this
// step read. Behind it come the stores to the other tiles: all warps have then waited for the
// products of the step before, which read those.
#pragma once
#include "kernels/select/tile_rule.h"
#include "prim/warp.h"
#include "tile/tile.h"

namespace vsa {

struct FloatMatrix {
  float* values;
  int64_t matrix_stride, row_stride, column_stride;  // elements
  bool pairs;  // rows are of pairs: contiguous, even in length, aligned to two numbers
};

struct FloatProductParams {
  static constexpr int kMost = 3;

  struct Product {
    FloatMatrix left, right, out;  // [rows, depth], [columns, depth], [rows, columns]
    FloatMatrix weights, outputs;  // [rows, columns], [rows, depth], for the gradient of scores
    int rows, columns, depth;
    float scale;
    bool accumulate;
    int blocks;  // up to the end of this product

    VSA_HD int row_tiles() const { return ceil_div(rows, kTileRows); }
    VSA_HD int column_tiles() const { return ceil_div(columns, kTileRows); }
  };
  Product products[kMost];
};

// What the sides of a product stand for, queries first.
enum class Sides { RowsAndColumns, RowsAndDepth, DepthAndRows };

struct MaskedProductParams : FloatProductParams {
  TileRule rule;
  int first_query;  // row of all that the queries of this product begin at
  Sides sides[kMost];
};

// OfScores: the gradient of scores. Masked: under a rule over tiles.
template <bool OfScores, bool Masked = false>
class FloatProduct {
 public:
  using Params = std::conditional_t<Masked, MaskedProductParams, FloatProductParams>;
  static constexpr int kThreads = kWarpgroupThreads;
  static constexpr int kPieces = 3;  // of a number: high, middle, low

  struct SharedMemory {
    Tile<64> right[2][kPieces];
  };

  VSA_DEVICE static void label_tiles(SharedMemory& s) {
    for (int i = 0; i < 2 * kPieces; ++i) label(s.right[i / kPieces][i % kPieces], "right", i);
  }

  VSA_DEVICE static void run(const Params& params, SharedMemory& s) {
    int product = 0, block = block_index();
    while (block >= params.products[product].blocks) ++product;
    if (product > 0) block -= params.products[product - 1].blocks;
    if constexpr (Masked) block = longest_first(params, product, block);
    FloatProduct one(params.products[product], s, block);
    if constexpr (Masked) {
      one.mask_ = &params;
      one.sides_ = params.sides[product];
      if (one.is_left_out()) return;
    }
    one.multiply();
    one.store();
  }

 private:
  using Product = Params::Product;

  VSA_DEVICE FloatProduct(const Product& p, SharedMemory& s, int block)
      : p_(p),
        s_(s),
        first_column_(block % p.column_tiles() * kTileRows),
        first_row_(block / p.column_tiles() % p.row_tiles() * kTileRows),
        matrix_(block / p.column_tiles() / p.row_tiles()) {}

  // Blocks are numbered along columns, rows and matrices. Of products that leave out steps the one
  // that starts in a place: rows of all matrices together, and first those that have most steps
  // where queries see what was before them, which are the last queries and the first keys.
  VSA_DEVICE static int longest_first(const MaskedProductParams& params, int product, int place) {
    const Product& p = params.products[product];
    if (params.sides[product] == Sides::RowsAndColumns) return place;
    const int columns = p.column_tiles(), rows = p.row_tiles();
    const int blocks = p.blocks - (product > 0 ? params.products[product - 1].blocks : 0);
    const int of_row = blocks / rows, row = place / of_row, rest = place % of_row;
    const int matrix = rest / columns, column = rest % columns;
    const int from_end = params.sides[product] == Sides::RowsAndDepth ? rows - 1 - row : row;
    return (matrix * rows + from_end) * columns + column;
  }

  VSA_DEVICE void multiply() {
    int first = 0;
    fill(total_, 0.f);
    if constexpr (OfScores) fill(delta_, 0.f);
    if constexpr (Masked) {
      first = step_from(0);
      if (first >= p_.depth) return;
    }
    fetch(first);
    put_right(0);
    for (int stage = 0, next; first < p_.depth; first = next, stage ^= 1) {
      next = step_from(first + kTileRows);
      VSA_UNROLL
      for (auto& piece : left_) take_piece(piece, left_values_);
      fence_async_proxy();
      named_sync(consumer_barrier(0), kThreads);
      issue_products(stage);
      if (next < p_.depth) {
        fetch(next);
        put_right(stage ^ 1);
      }
      wgmma_wait<0>(sum_);
      zip(total_, sum_, [](float total, float sum) { return total + sum; });
    }
  }

  // The first step along k from there on that is not left out. Lanes look at a step each, 32 at a
  // time.
  VSA_DEVICE int step_from(int first) {
    if constexpr (Masked) {
      if (sides_ == Sides::RowsAndColumns) return first;
      constexpr int kAtOnce = kWarpThreads * kTileRows;
      for (; first < p_.depth; first = (first / kAtOnce + 1) * kAtOnce) {
        const int begin = first / kAtOnce * kAtOnce;
        if (first == begin)
          steps_ = ballot([&](int lane) { return has_step(begin + lane * kTileRows); });
        const uint32_t left = steps_ & ~0u << (first - begin) / kTileRows;
        if (left != 0) return begin + bitmap::lowest(left) * kTileRows;
      }
    }
    return first;
  }

  VSA_DEVICE bool has_step(int first) const {
    if (first >= p_.depth) return false;
    return sides_ == Sides::RowsAndDepth ? meets(first_row_, p_.rows, first, p_.depth)
                                         : meets(first, p_.depth, first_row_, p_.rows);
  }

  VSA_DEVICE bool is_left_out() const {
    return sides_ == Sides::RowsAndColumns &&
           !meets(first_row_, p_.rows, first_column_, p_.columns);
  }

  // 64 query tiles and 64 key tiles, or fewer at the ends.
  VSA_DEVICE bool meets(int query, int queries, int key, int keys) const {
    const int after = query + kTileRows < queries ? query + kTileRows : queries;
    const int after_key = key + kTileRows < keys ? key + kTileRows : keys;
    const int first = mask_->first_query;
    return mask_->rule.meets({first + query, first + after}, {key, after_key});
  }

  // Numbers of the columns from `first` on.
  VSA_DEVICE void fetch(int first) {
    load(left_values_, p_.left, first_row_, p_.rows, first, p_.depth);
    if constexpr (OfScores) add_to_delta(first);
    load(right_values_, p_.right, first_column_, p_.columns, first, p_.depth);
  }

  // 64 x 64 of a matrix [rows, columns], zeros past its ends.
  VSA_DEVICE void load(Fragment<64>& to,
                       const FloatMatrix& x,
                       int first_row,
                       int rows,
                       int first_column,
                       int columns) {
    VSA_EACH_LANE(t) {
      auto& values = lane(to, t);
      const int row = first_row + accumulator_row(t, 0);
      const int column = first_column + accumulator_column(t, 0);
      const float* from = x.values + matrix_ * x.matrix_stride + row * x.row_stride;
      const float* starts[] = {from, from + 8 * x.row_stride};  // of the lane's two rows
      const bool inside[] = {row < rows, row + 8 < rows};
      if (x.pairs) {
        VSA_UNROLL
        for (int i = 0; i < 32; i += 2) {
          const int at = column + accumulator_column(0, i), half = i >> 1 & 1;
          const auto* pair = reinterpret_cast<const FloatPair*>(starts[half] + at);
          const FloatPair loaded = load_global(pair, inside[half] && at < columns);
          values[i] = loaded.x;
          values[i + 1] = loaded.y;
        }
      } else {
        VSA_UNROLL
        for (int i = 0; i < 32; ++i) {
          const int at = column + accumulator_column(0, i), half = i >> 1 & 1;
          values[i] =
              load_global(starts[half] + at * x.column_stride, inside[half] && at < columns);
        }
      }
    }
  }

  VSA_DEVICE void add_to_delta(int first) {
    load(right_values_, p_.outputs, first_row_, p_.rows, first, p_.depth);
    VSA_EACH_LANE(t) {
      const auto& left = lane(left_values_, t);
      const auto& outputs = lane(right_values_, t);
      auto& row = lane(delta_, t);
      VSA_UNROLL
      for (int i = 0; i < 32; ++i) row[i >> 1 & 1] = fma(left[i], outputs[i], row[i >> 1 & 1]);
    }
  }

  // Rounds numbers to bf16 and leaves what that has lost.
  VSA_DEVICE static void take_piece(Operand<64>& piece, Fragment<64>& rest) {
    round_to<Bf16>(piece, rest);
    VSA_EACH_LANE(t) {
      auto& x = lane(rest, t);
      const auto& pairs = lane(piece, t);
      VSA_UNROLL
      for (int r = 0; r < 16; ++r) {
        x[2 * r] -= widen_low<Bf16>(pairs[r]);
        x[2 * r + 1] -= widen_high<Bf16>(pairs[r]);
      }
    }
  }

  VSA_DEVICE void put_right(int stage) {
    VSA_UNROLL
    for (auto& tile : s_.right[stage]) {
      Operand<64> piece;
      take_piece(piece, right_values_);
      write_tile(tile, piece);
    }
  }

  VSA_DEVICE void issue_products(int stage) {
    constexpr int kHigh = 0, kMiddle = 1, kLow = 2;
    const auto& right = s_.right[stage];
    mma_ABt<Bf16>(sum_, left_[kLow], right[kHigh]);
    mma_ABt<Bf16>(sum_, left_[kMiddle], right[kMiddle], true);
    mma_ABt<Bf16>(sum_, left_[kHigh], right[kLow], true);
    mma_ABt<Bf16>(sum_, left_[kMiddle], right[kHigh], true);
    mma_ABt<Bf16>(sum_, left_[kHigh], right[kMiddle], true);
    mma_ABt<Bf16>(sum_, left_[kHigh], right[kHigh], true);
    wgmma_commit();
  }

  VSA_DEVICE void store() {
    if constexpr (OfScores) {
      quad_reduce(delta_, [](float a, float b) { return a + b; });
      map_rows(total_, delta_, [](float sum, float delta) { return sum - delta; });
      load(left_values_, p_.weights, first_row_, p_.rows, first_column_, p_.columns);
      zip(total_, left_values_, [](float sum, float weight) { return sum * weight; });
    } else {
      const float scale = p_.scale;
      for_each(total_, [=](float& sum, int, int) { sum *= scale; });
    }
    const bool accumulate = !OfScores && p_.accumulate;
    VSA_EACH_LANE(t) {
      const auto& values = lane(total_, t);
      VSA_UNROLL
      for (int i = 0; i < 32; i += 2) {
        const int row = first_row_ + accumulator_row(t, i);
        const int column = first_column_ + accumulator_column(t, i);
        float* to = place(p_.out, row, column);
        if (p_.out.pairs) {
          if (row >= p_.rows || column >= p_.columns) continue;
          auto& pair = *reinterpret_cast<FloatPair*>(to);
          const FloatPair before = accumulate ? pair : FloatPair{0, 0};
          pair = {before.x + values[i], before.y + values[i + 1]};
        } else {
          VSA_UNROLL
          for (int j = 0; j < 2; ++j, to += p_.out.column_stride)
            if (row < p_.rows && column + j < p_.columns)
              *to = (accumulate ? *to : 0) + values[i + j];
        }
      }
    }
  }

  VSA_DEVICE float* place(const FloatMatrix& x, int row, int column) const {
    return x.values + matrix_ * x.matrix_stride + row * x.row_stride + column * x.column_stride;
  }

  const Product& p_;
  SharedMemory& s_;
  const int first_column_, first_row_;
  const int64_t matrix_;
  const MaskedProductParams* mask_ = nullptr;
  Sides sides_ = Sides::RowsAndColumns;
  uint32_t steps_ = 0;                       // bit i: the i-th of 32 steps along k is not left out
  Fragment<64> left_values_, right_values_;  // of the next step, or what is left of them
  Operand<64> left_[kPieces];
  Fragment<64> sum_;    // of this step
  Fragment<64> total_;  // of the steps before
  RowValues delta_;     // sum_k left(m, k) O(m, k)
};

}  // namespace vsa
