// SPDX-License-Identifier: Apache-2.0
// Rules over tiles as tests draw them, and what they mean in plain loops.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <random>

namespace vsa::test {

struct Random {
  std::mt19937 rng;
  int below(int end) { return static_cast<int>(rng() % static_cast<unsigned>(end)); }
  bool coin() { return below(2) == 0; }
};

// The numbers of a rule, and what they mean.
struct Rule {
  int n[12] = {};

  explicit Rule(Random& random) {
    const int kind = random.below(3);
    n[2] = 1 + random.below(5);
    n[3] = 1 + random.below(7);
    n[5] = kind < 2 ? 1 + random.below(3) : 0;
    for (int i = 9; i < 12; ++i) n[i] = kind == 2 ? random.below(3) : -1;
    if (kind == 1) {  // two videos
      n[8] = 1 + random.below(5);
      n[0] = n[1] = 2 * n[8];
      return;
    }
    n[0] = 1 + random.below(6);
    n[4] = random.below(6);
    n[1] = n[0] + n[4];
    if (kind == 0 && random.coin()) {
      n[6] = 1 + random.below(3);
      n[7] = random.below(3);
    }
  }
  // One layer to a block of 64 tiles, which sees itself and the first one.
  static Rule of_layers(int layers, Random& random) {
    Rule rule(random);
    const int numbers[12] = {layers, layers, 8, 8, 0, 1, 1, 1, 0, -1, -1, -1};
    std::copy(std::begin(numbers), std::end(numbers), rule.n);
    return rule;
  }
  int plane() const { return n[2] * n[3]; }
  int queries() const { return n[0] * plane(); }
  int keys() const { return n[1] * plane(); }

  bool layers(int t, int s) const {
    if (n[9] >= 0) return std::abs(t - s) <= n[9];
    if (n[8] > 0) {
      const int own = t % n[8] / n[5], other = s % n[8] / n[5];
      if (t < n[8]) return s < n[8] && other <= own;
      return s < n[8] ? other < own : other == own;
    }
    const int own = t / n[5], other = s / n[5];
    return other <= own && (n[6] == 0 || own - other < n[6] || other < n[7]);
  }
  bool may(int i, int j) const {
    if (!layers(i / plane() + n[4], j / plane())) return false;
    const int h = std::abs(i % plane() / n[3] - j % plane() / n[3]);
    const int w = std::abs(i % n[3] - j % n[3]);
    return n[9] < 0 || (h <= n[10] && w <= n[11]);
  }
};

}  // namespace vsa::test
