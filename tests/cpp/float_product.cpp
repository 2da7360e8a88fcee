// SPDX-License-Identifier: Apache-2.0
// Products of random matrices of whole numbers, which fp32 holds with all their sums, against sums
// of integers: every bit counts. Numbers are as long as it takes for each of the six products of
// pieces to matter; what lies around the operands is NaN, and around the results must stay.
//
//   float_product NAMESPACE product|gradient SEEDS [MUTANT]    "seed N: " and the first report
//                                                              within so many, or "nothing"
//
// The namespaces are vsa, or those of VSA_EACH_MUTANT, which tests/mutants/test_float_product.py
// writes: one with a kernel that behaves as the mutant of a number, others with one mutant each.
#include "kernels/coarse/float_product.h"

#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "prim/host_block.h"
#include "reports.h"

namespace vsa::test {
namespace {

constexpr float kAround = 7;  // what lies around results

struct Random {
  std::mt19937 rng;
  int below(int end) { return static_cast<int>(rng() % static_cast<unsigned>(end)); }
  int size() { return below(2) == 0 ? 64 * (1 + below(2)) : 1 + below(130); }
};

// Matrices with room around them.
struct Numbers {
  int matrices, rows, columns;
  int64_t matrix_stride, row_stride, column_stride;
  bool pairs;
  std::vector<float> memory;

  Numbers(Random& random, int matrices, int rows, int columns, float around)
      : matrices(matrices), rows(rows), columns(columns) {
    const int kind = random.below(3);  // pairs where sizes allow, single numbers, transposed
    const int wide = columns + 1 + (kind == 0 ? (columns + 1) % 2 : 0);
    pairs = kind == 0 && columns % 2 == 0;
    row_stride = kind == 2 ? 1 : wide;
    column_stride = kind == 2 ? rows + 2 : 1;
    matrix_stride = kind == 2 ? (rows + 2) * int64_t{columns + 1} : wide * int64_t{rows + 1};
    if (kind == 0) matrix_stride += matrix_stride % 2;
    memory.assign(static_cast<size_t>(matrix_stride * matrices + 64), around);
  }
  float& at(int matrix, int row, int column) {
    return memory[static_cast<size_t>(matrix * matrix_stride + row * row_stride +
                                      column * column_stride)];
  }
  template <class Fn>
  void each(Fn fn) {
    for (int m = 0; m < matrices; ++m)
      for (int r = 0; r < rows; ++r)
        for (int c = 0; c < columns; ++c) fn(at(m, r, c), m, r, c);
  }
  template <class Matrix>
  Matrix view() {
    return {memory.data(), matrix_stride, row_stride, column_stride, pairs};
  }
};

// One of a launch. Rows of the left operand have two numbers that are not zero.
struct Problem {
  const int matrices, rows, columns, depth;
  Numbers left, right, outputs, weights, out;
  const float scale;
  const bool accumulate;

  explicit Problem(Random& random)
      : matrices(1 + random.below(2)),
        rows(random.size()),
        columns(random.size()),
        depth(random.size() + (random.below(2) == 0 ? 0 : 70)),
        left(random, matrices, rows, depth, NAN),
        right(random, matrices, columns, depth, NAN),
        outputs(random, matrices, rows, depth, NAN),
        weights(random, matrices, rows, columns, NAN),
        out(random, matrices, rows, columns, kAround),
        scale(random.below(2) == 0 ? 1.f : -0.5f),
        accumulate(random.below(2) == 0) {
    const int kind = random.below(3);  // which operand has the long numbers
    const int bits[][2] = {{20, 2}, {2, 20}, {11, 11}};
    const auto number = [&](int length) {
      return static_cast<float>(random.below((2 << length) + 1) - (1 << length));
    };
    left.each([](float& x, int, int, int) { x = 0; });
    for (int m = 0; m < matrices; ++m)
      for (int r = 0; r < rows; ++r)
        for (int i = 0; i < 2; ++i) left.at(m, r, random.below(depth)) = number(bits[kind][0]);
    right.each([&](float& x, int, int, int) { x = number(bits[kind][1]); });
    outputs.each([&](float& x, int, int, int) { x = number(bits[kind][1] - 1); });
    weights.each([&](float& x, int, int, int) { x = random.below(2) == 0 ? 0.5f : 2.f; });
    out.each([&](float& x, int, int, int) { x = number(9); });
  }

  template <class Matrix, class One>
  void describe(One& to, int& blocks) {
    to.left = left.view<Matrix>();
    to.right = right.view<Matrix>();
    to.out = out.view<Matrix>();
    to.weights = weights.view<Matrix>();
    to.outputs = outputs.view<Matrix>();
    to.rows = rows;
    to.columns = columns;
    to.depth = depth;
    to.scale = scale;
    to.accumulate = accumulate;
    to.blocks = blocks += to.row_tiles() * to.column_tiles() * matrices;
  }

  void solve(Numbers& answer, bool of_scores) {
    answer.each([&](float& x, int m, int r, int c) {
      double sum = 0;
      for (int k = 0; k < depth; ++k)
        if (const double number = left.at(m, r, k); number != 0)
          sum += number * (right.at(m, c, k) - (of_scores ? outputs.at(m, r, k) : 0.));
      x = static_cast<float>(of_scores ? weights.at(m, r, c) * sum
                                       : scale * sum + (accumulate ? x : 0.f));
    });
  }
};

template <class Kernel, class Matrix, bool OfScores>
std::string first_report(unsigned seeds) {
  return first_of(seeds, [](unsigned seed) {
    Random random{std::mt19937(seed)};
    std::vector<Problem> problems;
    const int count = OfScores ? 1 : 1 + random.below(3);
    for (int i = 0; i < count; ++i) problems.emplace_back(random);
    typename Kernel::Params params{};
    int blocks = 0;
    std::vector<Numbers> answers;
    for (int i = 0; i < count; ++i) {
      problems[i].template describe<Matrix>(params.products[i], blocks);
      answers.push_back(problems[i].out);
      problems[i].solve(answers.back(), OfScores);
    }
    for (int block = 0; block < blocks; ++block)
      host::run_warpgroup_block<Kernel>(params, block, blocks, seed + block);
    for (int i = 0; i < count; ++i)
      require(problems[i].out.memory == answers[i].memory, "WRONG NUMBERS");
  });
}

#ifndef VSA_EACH_MUTANT
#define VSA_EACH_MUTANT(PRODUCT, GRADIENT) PRODUCT(vsa) GRADIENT(vsa)
#endif

std::string answer(const std::string& space, const std::string& problem, unsigned seeds) {
#define VSA_PRODUCT(name)                     \
  if (space == #name && problem == "product") \
    return first_report<name::FloatProduct<false>, name::FloatMatrix, false>(seeds);
#define VSA_GRADIENT(name)                     \
  if (space == #name && problem == "gradient") \
    return first_report<name::FloatProduct<true>, name::FloatMatrix, true>(seeds);
  VSA_EACH_MUTANT(VSA_PRODUCT, VSA_GRADIENT)
  return "?";
}

}  // namespace
}  // namespace vsa::test

int main(int argc, char** argv) {
  if (argc == 5) vsa::test::mutant = std::stoi(argv[4]);
  std::puts(argc >= 4 ? vsa::test::answer(argv[1], argv[2], std::stoul(argv[3])).c_str() : "?");
}
