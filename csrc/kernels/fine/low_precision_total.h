// SPDX-License-Identifier: Apache-2.0
// The total of outputs to which a consumer adds what the tensor cores have summed: halves in shared
// memory, and in the end the output. Each thread keeps its own part, 16 bytes at a time, which no
// other reads or writes.
//
// What was summed is relative to the rows' maxima now, the total to those at the last addition:
//
//   total = total 2^(then - now) + out
#pragma once
#include "kernels/fine/low_precision_softmax.h"
#include "prim/warp.h"
#include "tile/quantised_tile.h"

namespace vsa {

template <int D>
class LowPrecisionTotal {
 public:
  using Sums = Fragment<D + kSumRows>;

  // Of the two rows of each thread, beside the total of its outputs: their sums of weights, and
  // their maxima at the last addition; bits of floats.
  struct Rows {
    Chunk of_thread[kWarpgroupThreads];
  };

  VSA_DEVICE static void clear(Tile<D>& place, Rows& rows) {
    note_write(&place, sizeof place);
    note_write(&rows, sizeof rows);
    VSA_EACH_LANE(t) {
      const auto nothing = static_cast<uint32_t>(float_bits(-INFINITY));
      rows.of_thread[t] = {{0, 0, nothing, nothing}};
      VSA_UNROLL
      for (int i = 0; i < kPieces; ++i) piece(place, i, t) = {};
    }
  }

  // factors: what `out` must be multiplied by to be relative to the maxima
  VSA_DEVICE static void add(Tile<D>& place,
                             Rows& rows,
                             const Sums& out,
                             const RowValues& maxima,
                             const RowValues& factors) {
    note_reads(place, rows);
    note_write(&place, sizeof place);
    note_write(&rows, sizeof rows);
    VSA_EACH_LANE(t) {
      const auto& x = lane(out, t);
      const auto& max = lane(maxima, t);
      const auto& own = lane(factors, t);
      Chunk row = rows.of_thread[t];
      uint32_t factor[2] = {};
      VSA_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float by = exp2_approx(number(row, 2 + half) - max[half]);
        const float sum = x[D / 2 + 2 * half] * own[half];
        row.pairs[half] = static_cast<uint32_t>(float_bits(fma(number(row, half), by, sum)));
        row.pairs[2 + half] = static_cast<uint32_t>(float_bits(max[half]));
        factor[half] = pack<Fp16>(by, by);
      }
      rows.of_thread[t] = row;
      const float unit[2] = {own[0] * kUnit, own[1] * kUnit};
      VSA_UNROLL
      for (int i = 0; i < kPieces; ++i) {
        Chunk& at = piece(place, i, t);
        Chunk halves = at;
        VSA_UNROLL
        for (int j = 0; j < 4; ++j) {
          const int pair = 4 * i + j;
          const float by = unit[pair & 1];
          halves.pairs[j] = fma_halves(halves.pairs[j], factor[pair & 1],
                                       pack<Fp16>(x[2 * pair] * by, x[2 * pair + 1] * by));
        }
        at = halves;
      }
    }
  }

  // out = total / sum of weights * scales, and lse beside it, which holds the rows' maxima before.
  // of_mean: [64] in shared memory, products of the rows with the mean of K, by which all their
  // scores are too small; scales: [D], of the values
  VSA_DEVICE static void finish(Fragment<D>& out,
                                RowValues& lse,
                                const Tile<D>& place,
                                const Rows& rows,
                                const float (&of_mean)[kTileRows],
                                float scale_of_scores,
                                const float* scales) {
    RowValues sum, products;
    take(out, sum, place, rows);
    // One lane of four has a row's sum, the others zeros.
    quad_reduce(sum, [](float a, float b) { return a + b; });
    note_read(of_mean, sizeof of_mean);
    set_rows(products, [&](int row) { return of_mean[row]; });
    zip(lse, sum, [](float max, float all) { return max + log2_approx(all / kTopWeight); });
    zip(lse, products, [=](float x, float mean) { return fma(mean, scale_of_scores, x) * kLn2; });
    zip(lse, sum, [](float x, float all) { return all == 0 ? -INFINITY : x; });
    zip(sum, sum, [](float all, float) { return all == 0 ? 0 : 1 / all; });
    scale_rows(out, sum);
    VSA_EACH_LANE(t) {
      auto& x = lane(out, t);
      VSA_UNROLL
      for (int i = 0; i < D / 2; i += 4) {  // two rows, two neighbouring channels
        const auto* at = reinterpret_cast<const FloatPair*>(scales + accumulator_column(t, i));
        const FloatPair scale = load_global(at, true);
        x[i] *= scale.x;
        x[i + 1] *= scale.y;
        x[i + 2] *= scale.x;
        x[i + 3] *= scale.y;
      }
    }
  }

 private:
  static constexpr float kLn2 = 0.69314718f;
  static constexpr int kPieces = D / 16;  // of a thread, eight halves each
  // Of the halves: 684,000 keys with the largest weights and values fit.
  static constexpr float kUnit = 0x1p-20f;
  static_assert(kPieces * kWarpgroupThreads * kChunkBytes == sizeof(Tile<D>));

  // result = the total, relative to the maxima at the last addition; sums: of weights, in the first
  // of the four lanes of a row, zeros in the others
  VSA_DEVICE static void take(Fragment<D>& result,
                              RowValues& sums,
                              const Tile<D>& place,
                              const Rows& rows) {
    note_reads(place, rows);
    VSA_EACH_LANE(t) {
      auto& all = lane(sums, t);
      auto& to = lane(result, t);
      const Chunk row = rows.of_thread[t];
      all[0] = number(row, 0);
      all[1] = number(row, 1);
      VSA_UNROLL
      for (int i = 0; i < kPieces; ++i) {
        const Chunk halves = piece(place, i, t);
        VSA_UNROLL
        for (int j = 0; j < 4; ++j) {
          const int pair = 4 * i + j;
          to[2 * pair] = widen_low<Fp16>(halves.pairs[j]) / kUnit;
          to[2 * pair + 1] = widen_high<Fp16>(halves.pairs[j]) / kUnit;
        }
      }
    }
  }

  VSA_DEVICE static float number(const Chunk& row, int i) {
    return float_of(static_cast<int>(row.pairs[i]));
  }
  VSA_DEVICE static void note_reads(const Tile<D>& place, const Rows& rows) {
    note_read(&place, sizeof place);
    note_read(&rows, sizeof rows);
  }
  VSA_DEVICE static Chunk& piece(const Tile<D>& place, int i, int thread) {
    const uint32_t at = place.address() + (i * kWarpgroupThreads + thread) * kChunkBytes;
    return *reinterpret_cast<Chunk*>(smem_words(at));
  }
};

}  // namespace vsa
