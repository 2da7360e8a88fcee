// SPDX-License-Identifier: Apache-2.0
// The total of outputs to which a consumer adds what the tensor cores have summed: halves in shared
// memory. Each thread keeps its own part, 16 bytes at a time, which no other reads.
//
// What was summed is relative to the rows' maxima now, the total to those at the last addition:
//
//   total = total 2^(then - now) + out
#pragma once
#include "tile/quantised_tile.h"

namespace vsa {

template <int D>
class LowPrecisionTotal {
 public:
  using Sums = Fragment<D + kSumRows>;

  // Of the two rows of each thread, beside the total of its outputs.
  struct alignas(kChunkBytes) Rows {
    struct alignas(kChunkBytes) Row {
      float sum[2];  // of weights
      float max[2];  // of the row at the last addition
    } of_thread[kWarpgroupThreads];
  };

  // there: whether there is a total yet
  VSA_DEVICE static void add(Tile<D>& place,
                             Rows& rows,
                             const Sums& out,
                             const RowValues& maxima,
                             bool there) {
    if (there) note_reads(place, rows);
    note_write(&place, sizeof place);
    note_write(&rows, sizeof rows);
    VSA_EACH_LANE(t) {
      const auto& x = lane(out, t);
      const auto& max = lane(maxima, t);
      auto& row = rows.of_thread[t];
      uint32_t factor[2] = {};
      VSA_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float own = x[D / 2 + 2 * half];
        const float by = there ? exp2_approx(row.max[half] - max[half]) : 0;
        row.sum[half] = there ? fma(row.sum[half], by, own) : own;
        row.max[half] = max[half];
        factor[half] = pack<Fp16>(by, by);
      }
      VSA_UNROLL
      for (int i = 0; i < kPieces; ++i) {
        Chunk& at = piece(place, i, t);
        Chunk halves = {};
        if (there) halves = at;
        VSA_UNROLL
        for (int j = 0; j < 4; ++j) {
          const int pair = 4 * i + j;
          const uint32_t own = pack<Fp16>(x[2 * pair] * kUnit, x[2 * pair + 1] * kUnit);
          halves.pairs[j] = there ? fma_halves(halves.pairs[j], factor[pair & 1], own) : own;
        }
        at = halves;
      }
    }
  }

  // result = what was summed, if anything was, and the total, if there is one; sums: of weights, in
  // the first of the four lanes of a row, zeros in the others
  VSA_DEVICE static void take(Fragment<D>& result,
                              RowValues& sums,
                              const Tile<D>& place,
                              const Rows& rows,
                              const Sums& out,
                              const RowValues& maxima,
                              bool has_sums,
                              bool there) {
    if (there) note_reads(place, rows);
    VSA_EACH_LANE(t) {
      const auto& x = lane(out, t);
      const auto& max = lane(maxima, t);
      const auto& row = rows.of_thread[t];
      auto& all = lane(sums, t);
      auto& to = lane(result, t);
      float by[2] = {};
      VSA_UNROLL
      for (int half = 0; half < 2; ++half) {
        all[half] = has_sums ? x[D / 2 + 2 * half] : 0;
        if (!there) continue;
        by[half] = exp2_approx(row.max[half] - max[half]);
        all[half] = fma(row.sum[half], by[half], all[half]);
      }
      VSA_UNROLL
      for (int i = 0; i < D / 2; ++i) to[i] = has_sums ? x[i] : 0;
      if (there) {
        VSA_UNROLL
        for (int i = 0; i < kPieces; ++i) {
          const Chunk halves = piece(place, i, t);
          VSA_UNROLL
          for (int j = 0; j < 4; ++j) {
            const int pair = 4 * i + j;
            const float factor = by[pair & 1] / kUnit;
            to[2 * pair] = fma(widen_low<Fp16>(halves.pairs[j]), factor, to[2 * pair]);
            to[2 * pair + 1] = fma(widen_high<Fp16>(halves.pairs[j]), factor, to[2 * pair + 1]);
          }
        }
      }
    }
  }

 private:
  static constexpr int kPieces = D / 16;  // of a thread, eight halves each
  // Of the halves: 684,000 keys with the largest weights and values fit.
  static constexpr float kUnit = 0x1p-20f;
  static_assert(kPieces * kWarpgroupThreads * kChunkBytes == sizeof(Tile<D>));

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
