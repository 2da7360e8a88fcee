// SPDX-License-Identifier: Apache-2.0
// What a warpgroup does with its registers: loops over (lane, register), written once for both
// machines. Inside if_any_row they act on one warp's rows.
#pragma once
#include "prim/prim.h"

namespace vsa {

// fn(x, row, column) for every element
template <int N, class Fn>
VSA_DEVICE void for_each(Fragment<N>& f, Fn fn) {
  VSA_EACH_LANE(t) {
    auto& x = lane(f, t);
    VSA_UNROLL
    for (int i = 0; i < N / 2; ++i) fn(x[i], accumulator_row(t, i), accumulator_column(t, i));
  }
}

// x = value in the columns whose bit is not set. A lane shifts the bits once, so that each of its
// columns is a constant place in them, the same for all lanes.
VSA_DEVICE void fill_columns(Fragment<64>& f, uint64_t kept, float value) {
  VSA_EACH_LANE(t) {
    auto& x = lane(f, t);
    const uint64_t own = kept >> accumulator_column(t, 0);
    VSA_UNROLL
    for (int i = 0; i < 32; ++i)
      if ((own >> accumulator_column(0, i) & 1) == 0) x[i] = value;
  }
}

// x = fn(x, values[row])
template <int N, class Fn>
VSA_DEVICE void map_rows(Fragment<N>& f, const RowValues& values, Fn fn) {
  VSA_EACH_LANE(t) {
    auto& x = lane(f, t);
    const auto& row = lane(values, t);
    VSA_UNROLL
    for (int i = 0; i < N / 2; ++i) x[i] = fn(x[i], row[i >> 1 & 1]);
  }
}

template <int N>
VSA_DEVICE void scale_rows(Fragment<N>& f, const RowValues& factors) {
  map_rows(f, factors, [](float x, float factor) { return x * factor; });
}

// x = fn(x, values[column]) for N floats in shared memory
template <int N, class Fn>
VSA_DEVICE void map_columns(Fragment<N>& f, const float* values, Fn fn) {
  note_read(values, N * sizeof(float));
  VSA_EACH_LANE(t) {
    auto& x = lane(f, t);
    VSA_UNROLL
    for (int i = 0; i < N / 2; i += 4) {  // two rows, two neighbouring columns
      const float left = values[accumulator_column(t, i)];
      const float right = values[accumulator_column(t, i) + 1];
      x[i] = fn(x[i], left);
      x[i + 1] = fn(x[i + 1], right);
      x[i + 2] = fn(x[i + 2], left);
      x[i + 3] = fn(x[i + 3], right);
    }
  }
}

// values[row] = op(values[row], x) over a lane's own elements; quad_reduce does the rest. Two
// chains for each row: a warp has nothing else to do while it waits for one.
template <int N, class Op>
VSA_DEVICE void fold_rows(RowValues& values, const Fragment<N>& f, Op op) {
  VSA_EACH_LANE(t) {
    const auto& x = lane(f, t);
    auto& row = lane(values, t);
    float other[2] = {op(x[4], x[5]), op(x[6], x[7])};
    VSA_UNROLL
    for (int i = 0; i < 4; ++i) row[i >> 1] = op(row[i >> 1], x[i]);
    VSA_UNROLL
    for (int i = 8; i < N / 2; ++i) {
      float& chain = (i & 4) == 0 ? row[i >> 1 & 1] : other[i >> 1 & 1];
      chain = op(chain, x[i]);
    }
    row[0] = op(row[0], other[0]);
    row[1] = op(row[1], other[1]);
  }
}

// x = fn(x, y)
template <int N, class Fn>
VSA_DEVICE void zip(Fragment<N>& f, const Fragment<N>& g, Fn fn) {
  VSA_EACH_LANE(t) {
    auto& x = lane(f, t);
    const auto& y = lane(g, t);
    VSA_UNROLL
    for (int i = 0; i < N / 2; ++i) x[i] = fn(x[i], y[i]);
  }
}

template <class Fn>
VSA_DEVICE void zip(RowValues& f, const RowValues& g, Fn fn) {
  VSA_EACH_LANE(t) {
    auto& x = lane(f, t);
    const auto& y = lane(g, t);
    x[0] = fn(x[0], y[0]);
    x[1] = fn(x[1], y[1]);
  }
}

template <int N>
VSA_DEVICE void fill(Fragment<N>& f, float value) {
  for_each(f, [=](float& x, int, int) { x = value; });
}

VSA_DEVICE void fill(RowValues& values, float value) {
  VSA_EACH_LANE(t) {
    auto& x = lane(values, t);
    x[0] = x[1] = value;
  }
}

// values[row] = fn(row)
template <class Fn>
VSA_DEVICE void set_rows(RowValues& values, Fn fn) {
  VSA_EACH_LANE(t) {
    auto& x = lane(values, t);
    x[0] = fn(accumulator_row(t, 0));
    x[1] = fn(accumulator_row(t, 2));
  }
}

// fn(value, row), once per row: by the first of the four lanes that hold it
template <class Fn>
VSA_DEVICE void for_each_row(const RowValues& values, Fn fn) {
  VSA_EACH_LANE(t) {
    if (t % 4 == 0) {
      const auto& x = lane(values, t);
      fn(x[0], accumulator_row(t, 0));
      fn(x[1], accumulator_row(t, 2));
    }
  }
}

// pairs = 0 in the rows whose bit is not set
VSA_DEVICE void keep_rows(Operand<64>& a, uint64_t kept) {
  VSA_EACH_LANE(t) {
    auto& pairs = lane(a, t);
    VSA_UNROLL
    for (int r = 0; r < 16; ++r)
      if ((kept >> pair_row(t, r) & 1) == 0) pairs[r] = 0;
  }
}

// An accumulator becomes the next product's A operand without leaving its lanes.
template <class Element, int N>
VSA_DEVICE void round_to(Operand<N>& a, const Fragment<N>& f) {
  VSA_EACH_LANE(t) {
    const auto& x = lane(f, t);
    auto& pairs = lane(a, t);
    VSA_UNROLL
    for (int r = 0; r < N / 4; ++r) pairs[r] = pack<Element>(x[2 * r], x[2 * r + 1]);
  }
}

}  // namespace vsa
