// SPDX-License-Identifier: Apache-2.0
// Queries in eight bits, from a tile in shared memory into the registers of the A operand:
//
//   q = round(Q / scale),   scale: the row's largest magnitude becomes 127, or 16 as e4m3
//
// Numbers of e4m3 are off by some percent. What all scores of a row have in common of that is how
// far q is too long or short in the direction of Q: softmax prefers keys in that direction, so that
// the log-sum-exp of many keys has this error and little else. So with e4m3 the scale that scores
// are multiplied by is larger by Q . Q / (Q . q), which keeps the row's product with itself.
//
// A row with infinity or NaN gets NaN for its scale.
#pragma once
#include "prim/warp.h"
#include "tile/quantised_tile.h"

namespace vsa {

// Key: S8 or E4m3
template <class Element, int D, class Key>
class LowPrecisionQueries {
 public:
  // scale: of each row, times that of all scores. of_mean: [64] in shared memory, each row's
  // product with the mean of K, by which all its scores are too small; for any thread after a
  // barrier. means: [D], of K
  VSA_DEVICE static void read(Operand8<D>& q,
                              RowValues& scale,
                              float* of_mean,
                              const Tile<D>& tile,
                              const float* means,
                              float scale_of_scores) {
    note_read(&tile, sizeof tile, Layout::Swizzled);
    RowValues most, special, products;
    VSA_EACH_LANE(t) {
      auto& largest = lane(most, t);
      auto& spoilt = lane(special, t);
      auto& product = lane(products, t);
      largest[0] = largest[1] = spoilt[0] = spoilt[1] = product[0] = product[1] = 0;
      VSA_UNROLL
      for (int r = 0; r < D / 8; ++r) {
        float x[4];
        read_four(x, tile, t, r);
        const int half = r & 1;
        const Chunk mean = load_global(reinterpret_cast<const Chunk*>(means + four_column(t, r)));
        VSA_UNROLL
        for (int c = 0; c < 4; ++c) {
          largest[half] = max2(largest[half], x[c] < 0 ? -x[c] : x[c]);
          spoilt[half] += x[c] * 0;  // NaN for infinity and NaN
          product[half] = fma(x[c], float_of(static_cast<int>(mean.pairs[c])), product[half]);
        }
      }
    }
    const auto add = [](float a, float b) { return a + b; };
    quad_reduce(most, max2);
    quad_reduce(special, add);
    quad_reduce(products, add);
    note_write(of_mean, kTileRows * sizeof(float));
    for_each_row(products, [&](float x, int row) { of_mean[row] = x; });
    zip(most, most, [](float x, float) { return max2(x, kLeastMagnitude); });
    scale = most;
    zip(scale, special,
        [=](float x, float nan) { return x / kMostScored<Key> * scale_of_scores + nan; });
    RowValues own, rounded;  // products of each row with itself
    VSA_EACH_LANE(t) {
      const auto& largest = lane(most, t);
      auto& fours = lane(q, t);
      auto& exact = lane(own, t);
      auto& got = lane(rounded, t);
      exact[0] = exact[1] = got[0] = got[1] = 0;
      const float factor[2] = {kMostScored<Key> / largest[0], kMostScored<Key> / largest[1]};
      VSA_UNROLL
      for (int r = 0; r < D / 8; ++r) {
        float x[4];
        read_four(x, tile, t, r);
        const float by = factor[r & 1];
        VSA_UNROLL
        for (float& each : x) each *= by;
        fours[r] = pack8<Key>(x[0], x[1], x[2], x[3]);
        if constexpr (kKeepsProducts) {
          float codes[4];
          widen_e4m3(codes, fours[r]);
          VSA_UNROLL
          for (int c = 0; c < 4; ++c) {
            exact[r & 1] = fma(x[c], x[c], exact[r & 1]);
            got[r & 1] = fma(x[c], codes[c], got[r & 1]);
          }
        }
      }
    }
    if constexpr (kKeepsProducts) {
      quad_reduce(own, add);
      quad_reduce(rounded, add);
      zip(own, rounded, [](float exact, float got) { return got > 0 ? exact / got : 1; });
      zip(scale, own, [](float x, float by) { return x * by; });
    }
  }

 private:
  static constexpr bool kKeepsProducts = std::is_same_v<Key, E4m3>;

  VSA_DEVICE static void read_four(float (&x)[4], const Tile<D>& tile, int t, int r) {
    const uint32_t* pairs = smem_words(pair_address(tile, four_row(t, r), four_column(t, r)));
    VSA_UNROLL
    for (int i = 0; i < 2; ++i) {
      x[2 * i] = widen_low<Element>(pairs[i]);
      x[2 * i + 1] = widen_high<Element>(pairs[i]);
    }
  }
};

}  // namespace vsa
