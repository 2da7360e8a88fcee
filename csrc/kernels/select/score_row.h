// SPDX-License-Identifier: Apache-2.0
// One row of tile scores in the hands of a warp: lane l has the columns l, l + 32, ..., so that a
// ballot over the lanes is a word of the row's bitmap.
//
// Scores are kept so that one comparison says it all: a NaN becomes -inf, a forced tile is marked
// as NaN and therefore never less than a pivot, and places past the last column hold -inf, in which
// every column goes first. Under a mask the places of tiles that the row may not choose are like
// these: its columns are the others.
#pragma once
#include <climits>

#include "kernels/select/softmax_mass.h"
#include "kernels/select/tile_rule.h"
#include "kernels/select/time_order.h"
#include "prim/warp.h"

namespace vsa {

struct SelectTilesParams {
  static constexpr int kMostCounts = 256;

  const float* scores;   // [rows, columns]
  const uint32_t* must;  // [query_tiles, words] tiles that are forced, null without
  uint32_t* bitmap;      // [rows, words]
  float* weights;        // [rows, columns] softmax of the scores, null without; may be `scores`
  int first_row;         // number of the first row among all, [batch, heads, query_tiles]
  int rows, columns, query_tiles;
  double mass;              // least share of the softmax, 0 for none
  int num_counts;           // 1 or heads
  int counts[kMostCounts];  // least tiles of a row
  TimeOrder order;          // of the columns, without a mask

  VSA_HD int words() const { return bitmap::words(columns); }
  VSA_HD int query_tile(int row) const { return (first_row + row) % query_tiles; }
  VSA_HD int count(int row) const {
    return counts[num_counts == 1 ? 0 : (first_row + row) / query_tiles % num_counts];
  }
};

struct MaskedSelectParams : SelectTilesParams {
  double shares[kMostCounts];  // like counts: of what a row may choose, 0 where counts hold
  TileMask mask;

  // Least tiles of a row that may choose so many.
  VSA_DEVICE int count_of(int row, int allowed) const {
    const double share = shares[num_counts == 1 ? 0 : (first_row + row) / query_tiles % num_counts];
    int least = count(row);
    if (share > 0) {
      least = static_cast<int>(ceil(allowed * share));
      if (least < 1) least = 1;
    }
    return least < allowed ? least : allowed;
  }
};

// What a row without a mask has in place of one.
struct AllTiles {
  VSA_DEVICE AllTiles(const SelectTilesParams&, int) {}
  VSA_DEVICE static bool has(int) { return true; }
};
template <class Allowed>
struct RowMask : Allowed {
  VSA_DEVICE RowMask(const MaskedSelectParams& p, int row) : Allowed(p.mask, p.first_row + row) {}
};

// Whole numbers in the order of the floats that they stand for; +0 and -0 are one.
VSA_DEVICE int order_of(float x) {
  const int bits = float_bits(x);
  return bits < 0 ? INT_MIN - bits : bits;
}
VSA_DEVICE float of_order(int order) { return float_of(order < 0 ? INT_MIN - order : order); }

// By a name that no member of a row has.
template <class Value>
VSA_DEVICE int greatest_of_all(Value value) {
  return greatest(value);
}

struct Tally {  // of some tiles
  int count = 0;
  uint64_t mass = 0;
};

// A lane holds `Held` scores at a time: the whole row, or if it is `Longer` one part after another,
// read again for every question. `ByMass`: the tiles have softmax weights too. `Allowed`: those
// that the row may choose, AllTiles, AllowedRuns or AllowedTiles.
template <int Held, bool Longer, bool ByMass, class Allowed>
class ScoreRow {
 public:
  static constexpr bool kMasked = !std::is_same_v<Allowed, AllTiles>;
  using Params = std::conditional_t<kMasked, MaskedSelectParams, SelectTilesParams>;
  static constexpr int kStep = 8;
  static constexpr int kColumns = Held * kWarpThreads;
  // Words that a row has for certain, since it would be held by fewer registers otherwise.
  static constexpr int kSureWords = Longer || kMasked ? 0 : Held - kStep;

  VSA_DEVICE ScoreRow(const Params& p, int row)
      : allowed_(p, row),
        columns_(p.columns),
        words_(p.words()),
        scores_(p.scores + int64_t{row} * p.columns),
        must_(p.must ? p.must + int64_t{p.query_tile(row)} * p.words() : nullptr) {
    if constexpr (!Longer) read(0);
    if constexpr (kMasked) num_allowed_ = allowed_.count();
    survey();
    // A NaN among them makes the mean one, so that rows without any need no look at each score.
    if constexpr (kSureWords > 0)
      if (mean_ != mean_) replace_nans();
    if constexpr (!Longer) mark(0);
  }

  // Tiles that may be chosen.
  VSA_DEVICE int columns() const {
    if constexpr (kMasked)
      return num_allowed_;
    else
      return columns_;
  }
  VSA_DEVICE const auto& allowed() const { return allowed_; }
  VSA_DEVICE bool has_forced() const { return must_ != nullptr; }
  VSA_DEVICE float greatest() const { return greatest_; }
  // Of the row's complete words, under a mask of its numbers; NaN without any.
  VSA_DEVICE float mean() const { return mean_; }
  VSA_DEVICE float deviation() const { return deviation_; }

  // Of tiles with test(score).
  template <class Test>
  VSA_DEVICE Tally tally(Test test) {
    PerLane<float> count;  // these sums of floats are exact, and faster than sums of ints
    PerLane<uint64_t> mass;
    each_lane([&](int lane) { count[lane] = 0, mass[lane] = 0; });
    each_score([&](int lane, int i, float score) {
      const bool taken = test(score);
      count[lane] += taken ? 1.f : 0.f;
      if constexpr (ByMass) mass[lane] += taken ? part_[lane].weight[i] : 0;
    });
    Tally all = {sum([&](int lane) { return static_cast<int>(count[lane]); }), 0};
    if constexpr (ByMass) all.mass = sum([&](int lane) { return mass[lane]; });
    return all;
  }

  // The weight that tiles of this score have.
  VSA_DEVICE uint32_t weight(float score) const {
    return softmax_weight(score == greatest_ ? 0 : greatest_ - score);
  }

  // The bounds move to the outermost scores between them; there are some.
  VSA_DEVICE void shrink(float& low, float& high) {
    Extremes found;
    found.reset();
    each_score([&](int lane, int, float score) {
      if (score >= low && score <= high) found.include(lane, score);
    });
    low = found.low();
    high = found.high();
  }

  // fn(word, columns, score) for each word of the row's bitmap: which of its bits stand for
  // columns, and score(lane) of each.
  template <class Fn>
  VSA_DEVICE void each_word(Fn fn) {
    each_part([&](int first) {
      VSA_UNROLL
      for (int i = 0; i < Held; ++i) {
        const int word = first / kWarpThreads + i, bits = columns_ - word * kWordBits;
        if (i >= kSureWords && bits <= 0) return;
        const bool whole = i < kSureWords || bits >= kWordBits;
        uint32_t columns = whole ? ~0u : (1u << bits) - 1;
        if constexpr (kMasked)
          columns = ballot([&](int lane) { return allowed_.has(word * kWordBits + lane); });
        fn(word, columns, [&](int lane) { return part_[lane].score[i]; });
      }
    });
  }

 private:
  struct Part {
    float score[Held];
    uint32_t weight[ByMass ? Held : 1];
  };

  class Extremes {  // of scores that the lanes come across
   public:
    VSA_DEVICE void reset() {
      each_lane([&](int lane) { top_[lane] = below_[lane] = -INFINITY; });
    }
    VSA_DEVICE void include(int lane, float score) {
      top_[lane] = max2(top_[lane], score);
      below_[lane] = max2(below_[lane], -score);
    }
    VSA_DEVICE float high() { return of(top_); }
    VSA_DEVICE float low() { return -of(below_); }

    VSA_DEVICE static float of(PerLane<float>& most) {
      return of_order(greatest_of_all([&](int lane) { return order_of(most[lane]); }));
    }

   private:
    PerLane<float> top_, below_;  // greatest score, greatest negated one
  };

  // Before tiles are marked as forced.
  VSA_DEVICE void survey() {
    PerLane<float> top, total, squares;
    PerLane<int> numbers;  // under a mask
    each_lane([&](int lane) {
      top[lane] = -INFINITY, total[lane] = squares[lane] = 0;
      if constexpr (kMasked) numbers[lane] = 0;
    });
    for (int first = 0; first < (Longer ? columns_ : 1); first += kColumns) {
      if constexpr (Longer) read(first);
      each_lane([&](int lane) {
        VSA_UNROLL
        for (int i = 0; i < Held; ++i) {
          const float score = part_[lane].score[i];
          top[lane] = max2(top[lane], score);
          bool complete = i < kSureWords || first + (i + 1) * kWarpThreads <= columns_;
          if constexpr (kMasked) {
            complete = score > -INFINITY;
            numbers[lane] += complete ? 1 : 0;
          }
          const float counted = complete ? score : 0;
          total[lane] += counted;
          squares[lane] = fma(counted, counted, squares[lane]);
        }
      });
    }
    greatest_ = Extremes::of(top);
    int whole = columns_ / kWarpThreads * kWarpThreads;
    if constexpr (kMasked) whole = sum([&](int lane) { return numbers[lane]; });
    const float share = reciprocal_approx(static_cast<float>(whole));
    mean_ = sum([&](int lane) { return total[lane]; }) * share;
    const float square = sum([&](int lane) { return squares[lane]; }) * share;
    deviation_ = sqrtf(max2(fma(-mean_, mean_, square), 0));
  }

  // fn(first column) for each part of the row, while it is held.
  template <class Fn>
  VSA_DEVICE void each_part(Fn fn) {
    if constexpr (Longer) {
      for (int first = 0; first < columns_; first += kColumns) {
        read(first);
        mark(first);
        fn(first);
      }
    } else {
      fn(0);
    }
  }

  // fn(lane, place among those held, score)
  template <class Fn>
  VSA_DEVICE void each_score(Fn fn) {
    each_part([&](int) {
      each_lane([&](int lane) {
        VSA_UNROLL
        for (int i = 0; i < Held; ++i) fn(lane, i, part_[lane].score[i]);
      });
    });
  }

  VSA_DEVICE void read(int first) {
    each_lane([&](int lane) {
      const float* from = no_hoist(scores_ + first + lane);
      const int left = columns_ - first - lane;
      VSA_UNROLL
      for (int i = 0; i < Held; ++i) {
        float score = -INFINITY;
        // No load_global: weights may be written over the scores.
        if (i < kSureWords || may_hold(first, i, lane, left)) score = from[i * kWarpThreads];
        part_[lane].score[i] = i < kSureWords ? score : of_number(score);
      }
    });
  }
  // left: columns of the row from the lane's first one on
  VSA_DEVICE bool may_hold(int first, int place, int lane, int left) const {
    if constexpr (kMasked)
      return allowed_.has(first + place * kWarpThreads + lane);
    else
      return place * kWarpThreads < left;
  }
  VSA_DEVICE static float of_number(float score) { return max2(score, -INFINITY); }

  VSA_DEVICE void replace_nans() {
    each_lane([&](int lane) {
      VSA_UNROLL
      for (int i = 0; i < kSureWords; ++i) part_[lane].score[i] = of_number(part_[lane].score[i]);
    });
  }

  // Weights, and the marks of forced tiles.
  VSA_DEVICE void mark(int first) {
    if constexpr (ByMass) {
      each_lane([&](int lane) {
        const int left = columns_ - first - lane;
        VSA_UNROLL
        for (int i = 0; i < Held; ++i) {
          const bool real = i < kSureWords || may_hold(first, i, lane, left);
          part_[lane].weight[i] = real ? weight(part_[lane].score[i]) : 0;
        }
      });
    }
    if (must_ == nullptr) return;
    each_lane([&](int lane) {
      VSA_UNROLL
      for (int i = 0; i < Held; ++i) {
        const int word = first / kWarpThreads + i;
        if ((i < kSureWords || word < words_) && (load_global(must_ + word) >> lane & 1) != 0 &&
            (!kMasked || allowed_.has(word * kWordBits + lane)))
          part_[lane].score[i] = NAN;
      }
    });
  }

  std::conditional_t<kMasked, RowMask<Allowed>, AllTiles> allowed_;
  int num_allowed_;  // under a mask
  int columns_, words_;
  const float* scores_;
  const uint32_t* must_;
  float greatest_, mean_, deviation_;
  PerLane<Part> part_;
};

}  // namespace vsa
