// SPDX-License-Identifier: Apache-2.0
// Select stage: the key tiles that each row of scores keeps, as a bitmap, and where the coarse
// attention wants it the row's softmax. One warp per row.
//
// Tiles are taken in order: forced ones, then by falling score, equal scores by rising index. A row
// stops as soon as it has `count` tiles and their share of the row's softmax reaches `mass`.
//
// So a row is cut at one score. It is found by trying pivots, each a pass over the row that counts
// what is no less; the pivots decide how many passes it takes, never the result.
#pragma once
#include <climits>

#include "kernels/score_row.h"
#include "kernels/softmax_row.h"

namespace vsa {

template <int Held, bool Longer, bool ByMass>
class SelectTiles {
 public:
  using Row = ScoreRow<Held, Longer, ByMass>;
  // What a search needs besides the scores fits into 24 registers; more rows at a time hide the
  // latency of memory. Blocks of 128 threads; 0 leaves it to the compiler.
  static constexpr int kBlocksPerSm = Longer || ByMass ? 0 : 65536 / (128 * (Held + 24));

  VSA_DEVICE static void run(const SelectTilesParams& p, int row) {
    SelectTiles select(p, row);
    select.run();
    if (p.weights == nullptr) return;
    const int64_t first = int64_t{row} * p.columns;
    SoftmaxRow::run(p.scores + first, p.weights + first, p.columns, select.row_.greatest());
  }

 private:
  struct Cut {  // all tiles above a score, and the first `room` of those equal to it
    float last;
    int room;
  };

  VSA_DEVICE SelectTiles(const SelectTilesParams& p, int row)
      : row_(p, row),
        selected_(p.selected + int64_t{row} * p.words()),
        count_(p.count(row)),
        mass_(0) {
    if constexpr (ByMass) {
      const uint64_t total = row_.tally([](float) { return true; }).mass;
      mass_ = static_cast<uint64_t>(ceil(static_cast<double>(total) * p.mass));
    }
  }

  VSA_DEVICE void run() {
    Tally forced;
    if (row_.has_forced()) forced = row_.tally([](float score) { return score != score; });
    write(enough(forced) ? Cut{INFINITY, 0} : find_cut(forced));
  }

  VSA_DEVICE bool enough(Tally kept) const {
    return kept.count >= count_ && (!ByMass || kept.mass >= mass_);
  }

  // Between `low` and `high`, both included, lies the last score that is kept: all tiles down to
  // low are enough, those above high are not.
  VSA_DEVICE Cut find_cut(Tally above_high) {
    float low = -INFINITY, high = row_.greatest();
    int from_low = row_.columns();
    for (int pass = 0, futile = 0;; ++pass) {
      const int candidates = from_low - above_high.count;
      if (candidates == 1 || (!ByMass && from_low == count_)) return {low, INT_MAX};
      if (order_of(low) == order_of(high)) return {low, missing(above_high, low)};
      // A long search is one among equal scores, and ends here.
      if (pass % kLongSearch == kLongSearch - 1) {
        row_.shrink(low, high);
        continue;
      }
      const float guess =
          !ByMass && pass == 0 ? likely_cut() : between(low, high, from_low, above_high.count);
      const float pivot = choose(low, high, guess, futile);
      const Tally found = row_.tally([=](float score) { return !(score < pivot); });
      if (enough(found)) {
        low = pivot;
        from_low = found.count;
      } else {
        high = of_order(order_of(pivot) - 1);
        above_high = found;
      }
      futile = 2 * (from_low - above_high.count) <= candidates ? 0 : (futile + 1) % 3;
    }
  }

  // A score above low and not above high: the guess. If guesses were futile, the middle of the
  // scores, and then the middle of the floats between them.
  VSA_DEVICE float choose(float low, float high, float guess, int futile) const {
    const float left = low == -INFINITY ? lowest_likely(high) : low;
    const float middle = left + (high - left) * 0.5f;
    const float pivot = futile == 0 ? guess : middle;
    if (futile < 2 && pivot > low && pivot <= high) return pivot;
    const uint32_t bottom = static_cast<uint32_t>(order_of(low));
    const uint32_t span = static_cast<uint32_t>(order_of(high)) - bottom;
    return of_order(static_cast<int>(bottom + span - span / 2));
  }

  // Where `count` tiles would be above if scores were spread normally, whose quantiles are nearly
  // in proportion to the logarithm of the odds.
  VSA_DEVICE float likely_cut() const {
    constexpr float kDeviations = 0.4073f;  // for twice the odds
    const float cut = row_.mean() - kDeviations * odds(count_) * row_.deviation();
    return row_.greatest() < cut ? row_.greatest() : cut;
  }

  // Where the count should be right.
  VSA_DEVICE float between(float low, float high, int from_low, int above_high) const {
    const bool few = 8 * (from_low - above_high) < row_.columns();
    const auto scale = [&](int count) { return few ? static_cast<float>(count) : odds(count); };
    const float left = low == -INFINITY ? lowest_likely(high) : low;
    const float share = ByMass ? 0.5f
                               : quotient_approx(scale(from_low) - scale(count_),
                                                 scale(from_low) - scale(above_high));
    return left + (high - left) * share;
  }

  VSA_DEVICE float lowest_likely(float high) const {
    return (high < row_.mean() ? high : row_.mean()) - 3 * row_.deviation();
  }

  // Logarithm of the odds that a tile is among the first `count`: nearly linear in the score where
  // scores are spread normally.
  VSA_DEVICE float odds(int count) const {
    return log2_approx(count + 0.5f) - log2_approx(row_.columns() - count + 0.5f);
  }

  // Tiles of the score `last` that must join those above it.
  VSA_DEVICE int missing(Tally above, float last) const {
    const int tiles = count_ - above.count;
    if constexpr (ByMass) {
      const uint64_t weight = row_.weight(last);
      if (above.mass < mass_ && weight > 0) {
        const int more = static_cast<int>((mass_ - above.mass + weight - 1) / weight);
        return more > tiles ? more : tiles;
      }
    }
    return tiles;
  }

  VSA_DEVICE void write(Cut cut) {
    const auto down_to_cut = [&](auto score) {
      return ballot([&](int lane) { return !(score(lane) < cut.last); });
    };
    if (cut.room == INT_MAX) return write_words(down_to_cut);
    int room = cut.room;
    write_words([&](auto score) {
      const uint32_t ties = ballot([&](int lane) { return score(lane) == cut.last; });
      const uint32_t late = ballot([&](int lane) {
        return (ties >> lane & 1) != 0 && popcount(ties & ((1u << lane) - 1)) >= room;
      });
      room = popcount(ties) < room ? room - popcount(ties) : 0;
      return down_to_cut(score) & ~late;
    });
  }

  // kept(score): the bits of a word's columns that are kept.
  template <class Kept>
  VSA_DEVICE void write_words(Kept kept) {
    row_.each_word([&](int word, uint32_t columns, auto score) {
      const uint32_t bits = kept(score) & columns;
      each_lane([&](int lane) {
        if (lane == 0) selected_[word] = bits;
      });
    });
  }

  static constexpr int kLongSearch = 16;

  Row row_;
  uint32_t* selected_;
  int count_;
  uint64_t mass_;
};

}  // namespace vsa
