// SPDX-License-Identifier: Apache-2.0
// Select stage: the key tiles that each row of scores keeps, as a bitmap, and where the coarse
// attention wants it the row's softmax. One warp per row.
//
// Tiles are taken in order: forced ones, then by falling score, equal scores by rising index, or in
// the order of time where columns are slots of a ring. A row stops as soon as it has `count` tiles
// and their share of the row's softmax reaches `mass`.
//
// So a row is cut at one score. It is found by trying pivots, each a pass over the row that counts
// what is no less; the pivots decide how many passes it takes, never the result.
#pragma once
#include <climits>

#include "kernels/select/score_row.h"
#include "kernels/select/softmax_row.h"

namespace vsa {

constexpr int kSelectThreads = 128;  // of a block

template <int Held, bool Longer, bool ByMass, class Allowed = AllTiles>
class SelectTiles {
 public:
  using Row = ScoreRow<Held, Longer, ByMass, Allowed>;
  using Params = Row::Params;
  static constexpr bool kMasked = Row::kMasked;
  // What a search needs besides the scores fits into few registers, the runs of a mask included;
  // more rows at a time hide the latency of memory. 0 leaves it to the compiler.
  static constexpr int kOther = kMasked ? 40 : 24;
  static constexpr int kBlocksPerSm =
      std::is_same_v<Allowed, AllowedTiles> || ((Longer || ByMass) && kMasked) ? 3
      : Longer || ByMass ? 0
                         : 65536 / (kSelectThreads * (Held + kOther));

  VSA_DEVICE static void run(const Params& p, int row) {
    SelectTiles select(p, row);
    select.choose(p, row);
    if (p.weights == nullptr) return;
    const int64_t first = int64_t{row} * p.columns;
    const auto weigh = [&](const auto& allowed) {
      SoftmaxRow::run(p.scores + first, p.weights + first, select.row_.greatest(), allowed);
    };
    if constexpr (kMasked)
      weigh(select.row_.allowed());
    else
      weigh(AllColumns{p.columns});
  }

 private:
  struct Cut {  // all tiles above a score, and the first `room` of those equal to it
    float last;
    int room;
  };

  VSA_DEVICE SelectTiles(const Params& p, int row)
      : row_(p, row),
        bitmap_(p.bitmap + int64_t{row} * p.words()),
        count_(least(p, row, row_.columns())),
        odds_(odds(count_)),
        mass_(0) {
    if constexpr (ByMass) {
      const uint64_t total = row_.tally([](float) { return true; }).mass;
      mass_ = static_cast<uint64_t>(ceil(static_cast<double>(total) * p.mass));
    }
  }

  VSA_DEVICE static int least(const Params& p, int row, int allowed) {
    if constexpr (kMasked)
      return p.count_of(row, allowed);
    else
      return p.count(row);
  }

  VSA_DEVICE void choose(const Params& p, int row) {
    Tally forced;
    if (row_.has_forced()) forced = row_.tally([](float score) { return score != score; });
    const Cut cut = enough(forced) ? Cut{INFINITY, 0} : find_cut(forced);
    if constexpr (!kMasked)
      if (p.order.known() && cut.room != INT_MAX) return write_in_time(p, row, cut);
    write(cut);
  }

  VSA_DEVICE bool enough(Tally kept) const {
    return kept.count >= count_ && (!ByMass || kept.mass >= mass_);
  }

  // What a pass has told: how many tiles score no less than this.
  struct Bound {
    float score;
    float place;  // the score, or where it can be taken to lie if that is not finite
    float odds;
    int count;
  };

  // The last score that is kept lies between two bounds: tiles down to `low` are enough, those down
  // to `high` are not.
  VSA_DEVICE Cut find_cut(Tally above) {
    Bound low = {-INFINITY, lowest_likely(), odds(row_.columns()), row_.columns()};
    Bound high = {above_score(row_.greatest()), row_.greatest(), odds(above.count), above.count};
    float pivot = likely_cut();
    for (int passes = 0, futile = 0, before = INT_MAX / 2;; ++passes) {
      const int candidates = low.count - high.count;
      if (candidates == 1 || (!ByMass && low.count == count_)) return {low.score, INT_MAX};
      futile = 2 * candidates <= before || futile == 2 ? 0 : futile + 1;
      if (futile > 0 || !(pivot > low.score && !(pivot >= high.score))) {
        // A long search is one among equal scores.
        if (passes >= kLongSearch) {
          look_between(low, high);
          passes = 0;
        }
        const int bottom = order_of(low.score), top = order_of(high.score) - 1;
        if (bottom == top) return {low.score, missing(above, low.score)};
        pivot = middle(low, high, bottom, top, futile);
      }
      const Tally found = row_.tally([=](float score) { return !(score < pivot); });
      const Bound at = {pivot, pivot, odds(found.count), found.count};
      if (enough(found)) {
        low = at;
      } else {
        high = at;
        above = found;
      }
      before = candidates;
      pivot = between(low, high);
    }
  }

  // The least float above a score; above all of them NaN, which no pivot is found to reach.
  VSA_DEVICE static float above_score(float score) { return of_order(order_of(score) + 1); }

  // The bounds move to the outermost scores between them; there are some.
  VSA_DEVICE void look_between(Bound& low, Bound& high) {
    high.place = of_order(order_of(high.score) - 1);
    row_.shrink(low.score, high.place);
    low.place = low.score;
    high.score = above_score(high.place);
  }

  // Where guesses are futile, or are none: the middle of the scores, and then the middle of the
  // floats between them.
  VSA_DEVICE float middle(const Bound& low,
                          const Bound& high,
                          int bottom,
                          int top,
                          int futile) const {
    const float pivot = low.place + (high.place - low.place) * 0.5f;
    if (futile < 2 && pivot > low.score && !(pivot >= high.score)) return pivot;
    const uint32_t span = static_cast<uint32_t>(top) - static_cast<uint32_t>(bottom);
    return of_order(static_cast<int>(static_cast<uint32_t>(bottom) + span - span / 2));
  }

  // Where `count` tiles would be above if scores were spread normally, whose quantiles are nearly
  // in proportion to the logarithm of the odds.
  VSA_DEVICE float likely_cut() const {
    // ln 2 / 1.702: a logistic curve of that slope is nearly the normal one.
    constexpr float kDeviations = 0.4073f;  // for twice the odds
    const float cut = row_.mean() - kDeviations * odds_ * row_.deviation();
    return row_.greatest() < cut ? row_.greatest() : cut;
  }

  // Where the count should be right.
  VSA_DEVICE float between(const Bound& low, const Bound& high) const {
    const float share =
        ByMass ? 0.5f : (low.odds - odds_) * reciprocal_approx(low.odds - high.odds);
    return fma(high.place - low.place, share, low.place);
  }

  VSA_DEVICE float lowest_likely() const {
    const float top = row_.greatest();
    return (top < row_.mean() ? top : row_.mean()) - 3 * row_.deviation();
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
        int more;
        if constexpr (kMasked)
          more = least_of(weight, mass_ - above.mass);
        else
          more = static_cast<int>((mass_ - above.mass + weight - 1) / weight);
        return more > tiles ? more : tiles;
      }
    }
    return tiles;
  }

  // How many of a weight make up a mass: by halves, since a division of 64 bits is a call, around
  // which registers would be spilled.
  VSA_DEVICE int least_of(uint64_t weight, uint64_t mass) const {
    int low = 0, high = row_.columns();
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (weight * static_cast<uint64_t>(middle) >= mass ? high : low) = middle;
    }
    return high;
  }

  VSA_DEVICE void write(Cut cut) {
    const auto down_to_cut = [&](auto score) {
      return ballot([&](int lane) { return !(score(lane) < cut.last); });
    };
    if (cut.room == INT_MAX) {
      if (cut.last == -INFINITY) return write_words([](uint32_t columns, auto) { return columns; });
      return write_words([&](uint32_t, auto score) { return down_to_cut(score); });
    }
    int room = cut.room;
    write_words([&](uint32_t columns, auto score) {
      uint32_t ties = ballot([&](int lane) { return score(lane) == cut.last; });
      if constexpr (kMasked) ties &= columns;  // any of them may be the ones that go first
      const uint32_t late = ballot([&](int lane) {
        return (ties >> lane & 1) != 0 && popcount(ties & ((1u << lane) - 1)) >= room;
      });
      room = popcount(ties) < room ? room - popcount(ties) : 0;
      const uint32_t bits = down_to_cut(score) & ~late;
      if constexpr (kMasked) return bits & columns;
      return bits;
    });
  }

  // Equal scores go in the order of time. This is rare: scores are read again, so that it takes no
  // registers from what is not.
  VSA_DEVICE void write_in_time(const Params& p, int row, Cut cut) {
    const float* scores = p.scores + int64_t{row} * p.columns;
    const Run last = p.order.last();
    int early = 0;
    each_read_word(p, scores, [&](int word, auto score) {
      const uint32_t ties = ballot([&](int lane) { return score(lane) == cut.last; });
      early += popcount(ties & ~TimeOrder::bits_of(last, word));
    });
    int room = cut.room, late_room = room > early ? room - early : 0;
    each_read_word(p, scores, [&](int word, auto score) {
      const uint32_t above = ballot([&](int lane) { return score(lane) > cut.last; });
      const uint32_t ties = ballot([&](int lane) { return score(lane) == cut.last; });
      const uint32_t late = TimeOrder::bits_of(last, word);
      const uint32_t kept = first_of(ties & ~late, room) | first_of(ties & late, late_room);
      put_word(word, above | kept);
    });
  }

  // fn(word, score): NaN past the last column.
  template <class Fn>
  VSA_DEVICE static void each_read_word(const Params& p, const float* scores, Fn fn) {
    for (int word = 0; word < p.words(); ++word) {
      PerLane<float> score;
      each_lane([&](int lane) {
        const int column = word * kWordBits + lane;
        score[lane] = column < p.columns ? max2(scores[column], -INFINITY) : NAN;
      });
      fn(word, [&](int lane) { return score[lane]; });
    }
  }

  // The first bits of a word, as many as there is room for, which becomes less.
  VSA_DEVICE static uint32_t first_of(uint32_t bits, int& room) {
    const uint32_t found = ballot([&](int lane) {
      return (bits >> lane & 1) != 0 && popcount(bits & ((1u << lane) - 1)) < room;
    });
    room -= popcount(found);
    return found;
  }

  VSA_DEVICE void put_word(int word, uint32_t bits) {
    each_lane([&](int lane) {
      if (lane == 0) bitmap_[word] = bits;
    });
  }

  // kept(columns, score): the bits of a word that are kept, as in each_word.
  template <class Kept>
  VSA_DEVICE void write_words(Kept kept) {
    row_.each_word(
        [&](int word, uint32_t columns, auto score) { put_word(word, kept(columns, score)); });
  }

  static constexpr int kLongSearch = 10;

  Row row_;
  uint32_t* bitmap_;
  int count_;
  float odds_;  // of count_
  uint64_t mass_;
};

}  // namespace vsa
