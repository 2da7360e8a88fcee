// SPDX-License-Identifier: Apache-2.0
// Scores of tiles by the means of their runs: with rows q_ia and k_jb of run_layout.h,
//
//   score(i, j) = log sum_ab exp(scale q_ia . k_jb)
//
// Products are of fp16 rows, one on tensor cores where fp32 takes six. Rounding a number to eleven
// bits changes it by at most 2^-11 of itself, and a score by at most
//
//   2^-10 |scale| max_ab sum_c |q_iac k_jbc|
//
// since a logarithm of a sum of exponentials moves no further than the one that moves most; where
// errors are not all of one sign it is a small part of that. What the tokens' own rounding to bf16
// has left in the mean of 16 is more as a rule (2^-8 of each, a quarter of it in the mean), and of
// fp16 a quarter of it. Tiles that such a step exchanges hold the same mass to about as much.
//
// A consumer is a warpgroup with 128 rows of queries in registers, 32 quads. Its keys come in
// blocks of 64 rows, which all consumers of a (thread) block share:
//
//   producer    keys of the next steps     -> ring, contiguous copies
//   consumers   products of step n + 1     on tensor cores    \ at the same time
//               log-sum-exp of step n      -> scores          /
//
// A lane holds whole quads, 4 x 4 products of one query tile and one key tile each: maxima and sums
// stay in it, but for tiles of several quads, whose other rows are in the next lanes.
//
//   barrier          arrives                      waits
//   full[stage]      the producer, and its bytes  consumers, before products of the stage
//   empty[stage]     consumers, once products are done and factors read    the producer
#pragma once
#include "kernels/coarse/run_layout.h"
#include "tile/ring.h"
#include "tile/tile.h"

namespace vsa {

struct SubBlockScoresParams {
  const unsigned char* queries;  // [matrix, tile, slot, head_dim] fp16
  const float* query_factors;    // [matrix, tile, slot]
  const unsigned char* keys;     // [matrix, block] images
  const float* key_factors;      // [matrix, block, 64]
  float* scores;                 // [matrix, rows, columns]
  int rows, columns;             // tiles of queries and of keys, of a matrix
  int row_groups, parts;         // that rows and blocks of keys are shared out in
  float scale;                   // not zero
};

// Quads: of a tile. Empties: whether some slots are empty.
template <int D_, int Quads, bool Empties>
class SubBlockScores {
 public:
  using Params = SubBlockScoresParams;
  static constexpr int D = D_, kSlots = Quads * runs::kQuad;
  static constexpr int kConsumers = 2, kProducers = 1;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr int kStages = 6;
  static constexpr int kRowTiles = runs::kGroupQuads / Quads;    // of a consumer
  static constexpr int kBlockTiles = runs::kBlockQuads / Quads;  // of a block of keys
  static constexpr int kLaneTiles = runs::kLaneQuads / Quads;    // of these in a lane
  static constexpr int kImageBytes = kTileRows * D * kElementBytes;
  static constexpr int kFactorBytes = kTileRows * static_cast<int>(sizeof(float));

  struct SharedMemory {
    Tile<D> keys[kStages];
    alignas(128) float factors[kStages][kTileRows];
    Mbarrier full[kStages], empty[kStages];
  };

  VSA_DEVICE static void init_barriers(SharedMemory& s) {
    for (int i = 0; i < kStages; ++i) {
      s.full[i].init(1, "full", i);
      s.empty[i].init(kConsumers * kWarpgroupThreads, "empty", i);
      label(s.keys[i], "keys", i);
      label(s.factors[i], "factors", i);
    }
  }
  VSA_DEVICE static void prologue(const Params&, SharedMemory&, int, int) {}

  VSA_DEVICE static void produce(const Params& p, SharedMemory& s, int) {
    if (!elect_lane()) return;
    const Work work(p);
    const int64_t of_matrix = int64_t{work.matrix} * runs::key_blocks(p.columns, kSlots);
    for (int n = 0; n < work.steps; ++n) {
      const int stage = Ring<kStages>::stage(n);
      const int64_t block = of_matrix + work.first_block + n;
      s.empty[stage].wait(Ring<kStages>::use(n) - 1);
      s.full[stage].arrive_expect_tx(kImageBytes + kFactorBytes);
      bulk_load(s.keys[stage].bytes, p.keys + block * kImageBytes, kImageBytes, s.full[stage],
                Layout::Swizzled);
      bulk_load(s.factors[stage], p.key_factors + block * kTileRows, kFactorBytes, s.full[stage]);
    }
  }

  VSA_DEVICE static void consume(const Params& p, SharedMemory& s, int w) {
    SubBlockScores one(p, s, w);
    one.load_queries();
    one.score_all();
  }

 private:
  // What a block computes.
  struct Work {
    int matrix, row_group, first_block, steps;

    VSA_DEVICE explicit Work(const Params& p) {
      const int block = block_index(), part = block % p.parts;
      row_group = block / p.parts % p.row_groups;
      matrix = block / p.parts / p.row_groups;
      const int blocks = runs::key_blocks(p.columns, kSlots);
      const int each = ceil_div(blocks, p.parts), end = (part + 1) * each;
      first_block = part * each;
      steps = (end < blocks ? end : blocks) - first_block;
    }
  };
  struct Sums {
    Fragment<64> half[2];  // rows of slots 0 and 1 of the quads, of slots 2 and 3
  };

  VSA_DEVICE SubBlockScores(const Params& p, SharedMemory& s, int w)
      : p_(p), s_(s), work_(p), first_row_((work_.row_group * kConsumers + w) * kRowTiles) {}

  // Lane t has the four rows of quad t / 4: rows r and r + 8 of both halves. The sign of the scale
  // goes into the numbers, so that factors stay positive.
  VSA_DEVICE void load_queries() {
    const int64_t first = (int64_t{work_.matrix} * p_.rows + first_row_) * kSlots;
    const int slots = (p_.rows - first_row_) * kSlots;  // that there are
    const uint32_t sign = p_.scale < 0 ? 0x80008000 : 0;
    const float unit = (p_.scale < 0 ? -p_.scale : p_.scale) * kLog2E;
    VSA_EACH_LANE(t) {
      auto& factors = lane(row_factors_, t);
      VSA_UNROLL
      for (int u = 0; u < runs::kQuad; ++u) {
        const int slot = t / 4 * runs::kQuad + u;
        factors[u] = unit * (slot < slots ? load_global(p_.query_factors + first + slot) : 1);
      }
      VSA_UNROLL
      for (int half = 0; half < 2; ++half) {
        auto& pairs = lane(queries_[half], t);
        VSA_UNROLL
        for (int r = 0; r < D / 4; ++r) {
          const int slot = t / 4 * runs::kQuad + 2 * half + r % 2;
          const int64_t at = (first + slot) * D + pair_column(t, r);
          const auto* pair = reinterpret_cast<const uint32_t*>(p_.queries + at * kElementBytes);
          pairs[r] = slot < slots ? load_global(pair) ^ sign : 0;
        }
      }
    }
  }

  // Two steps at a time, so that no product is in flight where the loop begins again: ptxas would
  // have all of them wait for each other. While a consumer finishes the second, the tensor cores
  // have the other's products.
  VSA_DEVICE void score_all() {
    Sums even, odd;
    int n = 0;
    await(n);
    for (; n + 1 < work_.steps; n += 2) {
      issue(even, n);
      await(n + 1);
      issue(odd, n + 1);
      wgmma_wait<1>(even.half[0], even.half[1]);
      finish(even, n);
      // A real branch between the waits: without one, ptxas hoists the second one above.
      await(n + 2);
      wgmma_wait<0>(odd.half[0], odd.half[1]);
      finish(odd, n + 1);
    }
    if (n < work_.steps) {
      issue(even, n);
      wgmma_wait<0>(even.half[0], even.half[1]);
      finish(even, n);
    }
  }

  // Keys of step n, if it is one.
  VSA_DEVICE void await(int n) {
    if (n < work_.steps) s_.full[Ring<kStages>::stage(n)].wait(Ring<kStages>::use(n));
  }

  VSA_DEVICE void issue(Sums& sums, int n) {
    const int stage = Ring<kStages>::stage(n);
    mma_ABt<Fp16>(sums.half[0], queries_[0], s_.keys[stage]);
    mma_ABt<Fp16>(sums.half[1], queries_[1], s_.keys[stage]);
    wgmma_commit();
  }

  // Step n, whose products are done.
  VSA_DEVICE void finish(Sums& sums, int n) {
    const int stage = Ring<kStages>::stage(n);
    read_factors(stage);
    s_.empty[stage].arrive_all();
    find_tops(sums);
    neighbour_reduce<Quads>(tops_, [](float a, float b) { return max2(a, b); });
    add_up(sums);
    neighbour_reduce<Quads>(totals_, [](float a, float b) { return a + b; });
    store((work_.first_block + n) * kBlockTiles);
  }

  VSA_DEVICE void read_factors(int stage) {
    const float* from = s_.factors[stage];
    note_read(from, kFactorBytes);
    VSA_EACH_LANE(t) {
      auto& to = lane(column_factors_, t);
      VSA_UNROLL
      for (int k = 0; k < runs::kLaneQuads; ++k) {
        VSA_UNROLL
        for (int u = 0; u < runs::kQuad; ++u)
          to[k * runs::kQuad + u] = from[runs::factor_place({t % 4, k}, u)];
      }
    }
  }

  // Products become scores of runs but for the factors of their rows, and the largest of each pair
  // of tiles is found.
  VSA_DEVICE void find_tops(Sums& sums) {
    VSA_EACH_LANE(t) {
      auto& tops = lane(tops_, t);
      const auto& rows = lane(row_factors_, t);
      const auto& columns = lane(column_factors_, t);
      VSA_UNROLL
      for (int tile = 0; tile < kLaneTiles; ++tile) {
        tops[tile] = -INFINITY;
        VSA_UNROLL
        for (int u = 0; u < runs::kQuad; ++u) {
          auto& x = lane(sums.half[u / 2], t);
          float top = -INFINITY;
          VSA_UNROLL
          for (int b = 0; b < kSlots; ++b) {
            const int k = tile * Quads + b / runs::kQuad, v = b % runs::kQuad;
            const float factor = columns[k * runs::kQuad + v];
            float& product = x[runs::product_register(u, k, v)];
            product *= factor;
            if (Empties && factor < 0) product = -INFINITY;
            top = max2(top, product);
          }
          top *= rows[u];
          if (Empties && rows[u] < 0) top = -INFINITY;
          tops[tile] = max2(tops[tile], top);
        }
      }
    }
  }

  VSA_DEVICE void add_up(Sums& sums) {
    VSA_EACH_LANE(t) {
      auto& totals = lane(totals_, t);
      const auto& tops = lane(tops_, t);
      const auto& rows = lane(row_factors_, t);
      VSA_UNROLL
      for (int tile = 0; tile < kLaneTiles; ++tile) {
        float total = 0;
        VSA_UNROLL
        for (int u = 0; u < runs::kQuad; ++u) {
          const auto& x = lane(sums.half[u / 2], t);
          VSA_UNROLL
          for (int b = 0; b < kSlots; ++b) {
            const int k = tile * Quads + b / runs::kQuad, v = b % runs::kQuad;
            const float share =
                exp2_approx(fma(x[runs::product_register(u, k, v)], rows[u], -tops[tile]));
            total += Empties && rows[u] < 0 ? 0 : share;
          }
        }
        totals[tile] = total;
      }
    }
  }

  VSA_DEVICE void store(int first_column) {
    VSA_EACH_LANE(t) {
      const auto& totals = lane(totals_, t);
      const auto& tops = lane(tops_, t);
      const int row = first_row_ + t / 4 / Quads;
      float* to = p_.scores + (int64_t{work_.matrix} * p_.rows + row) * p_.columns;
      VSA_UNROLL
      for (int tile = 0; tile < kLaneTiles; ++tile) {
        const int column = first_column + tile * runs::kLanes + t % 4;
        const float score = (tops[tile] + log2_approx(totals[tile])) * kLn2;
        if (t / 4 % Quads == 0 && row < p_.rows && column < p_.columns) to[column] = score;
      }
    }
  }

  static constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

  const Params& p_;
  SharedMemory& s_;
  const Work work_;
  const int first_row_;          // tile of queries
  Operand<D> queries_[2];        // by halves, as the sums
  Fragment<8> row_factors_;      // of the lane's four rows, by log2(e) and the scale
  Fragment<32> column_factors_;  // of its 16 columns, of this step
  Fragment<8> tops_, totals_;    // of its tiles, of this step
};

}  // namespace vsa
