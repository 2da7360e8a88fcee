// SPDX-License-Identifier: Apache-2.0
// What writes the plan of a block's work: one warp, a chunk ahead of producers and consumers.
//
// Rows are query tiles and columns key tiles; in the transposed selection it is the other way
// round, and the same holds: text attends everything and is attended by everything.
//
// Order. A ring holds few tiles, so consumers wait for each other unless each finds its next tile
// among the next few. Every tile is one row's turn, that of a row that wants it; within a chunk the
// r-th of a row's n turns comes at (r + 1/2) / n, so that all rows advance alike.
#pragma once
#include <climits>

#include "kernels/plan.h"

namespace vsa {

// Words: of the bitmap, whose tiles are put in order together
// First, Second: stages of the rings that the tiles are loaded into; consumers hold their slot of
// the second while they take the next (kernels/slots.h)
template <int Rows, int Words, int Steps, int First, int Second>
class Planner {
 public:
  using Plan = vsa::Plan<Rows, Steps>;
  using Chunk = typename Plan::Chunk;
  static_assert(Words <= kWarpThreads, "a lane holds one word of each row");

  // first, second: the tensors whose tiles the columns are
  VSA_DEVICE Planner(Plan& plan,
                     const TiledSequence& rows,
                     const TiledSequence& columns,
                     const TokenTensor& first,
                     const TokenTensor& second)
      : plan_(plan), rows_(rows), columns_(columns), first_(first), second_(second) {}

  // What a block takes of a pass over query tiles.
  template <class Params>
  VSA_DEVICE void add_query_tiles(const Params& p, int* tickets) {
    const WorkList list(p.queries, Rows, p.batch, p.heads, p.query_axes);
    const int tiles = p.queries.grid.num_tiles(), sharing = p.heads / p.kv_heads;
    list.take_each(tickets, Rows, [&](const Work& work) {
      add(work, bitmap_of(p.selected, work.batch, p.heads, work.head, tiles, words()),
          work.head / sharing);
    });
  }

  // An item. bitmaps: [heads, tiles of the rows' video, words]; the columns of the first are those
  // of `head`, of the next those of the head after it
  VSA_DEVICE void add(const Work& work, const uint32_t* bitmaps, int head, int heads = 1) {
    begin_item(work);
    const int64_t size = int64_t{rows_.grid.num_tiles()} * words();
    uint32_t flags = Chunk::kFirst;
    for (int h = 0; h < heads; ++h) {
      for (int word = 0; word * kWordBits < columns_.num_tiles(); word += Words) {
        const bool last = h == heads - 1 && (word + Words) * kWordBits >= columns_.num_tiles();
        find(work.batch, bitmaps + h * size, word);
        const int steps = arrange();
        int done = 0;
        do {
          const int here = steps - done < Steps ? steps - done : Steps;
          const bool ends = last && done + here == steps;
          if (here == 0 && !ends) break;
          open({work, head + h, here, flags});
          write_steps(word, done);
          write_stops(work.batch, here, ends ? Stop::kEnd : Stop::kPage);
          close();
          flags = 0;
          done += here;
        } while (done < steps);
      }
    }
  }

  VSA_DEVICE void stop() {
    open({{}, 0, 0, Chunk::kStop});
    close();
  }

 private:
  VSA_DEVICE int words() const { return bitmap::words(columns_.grid.num_tiles()); }
  VSA_DEVICE static uint32_t below(int lane) { return (1u << lane) - 1; }

  VSA_DEVICE void begin_item(const Work& work) {
    VSA_UNROLL
    for (int r = 0; r < Rows; ++r) {
      tiles_[r] = tile_at(rows_, work.first_place + r, work.axis);
      held_[r] = INT_MAX;
    }
  }

  // The rows' words from `word` on, one in each lane.
  VSA_DEVICE void find(int batch, const uint32_t* bits, int word) {
    const int video = columns_.grid.num_tiles(), all = columns_.num_tiles();
    VSA_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const bool text = tiles_[r] >= 0 && rows_.is_text(tiles_[r]);
      each_lane([&](int lane) {
        const int at = word + lane, left = video - at * kWordBits;
        const bool there = tiles_[r] >= 0 && lane < Words && left > 0;
        wanted_[r][lane] = !there ? 0
                           : text ? left < kWordBits ? below(left) : ~0u
                                  : load_global(bits + int64_t{tiles_[r]} * words() + at);
      });
    }
    for (int j = video / kWordBits > word ? video / kWordBits - word : 0;
         j < Words && (word + j) * kWordBits < all; ++j)
      add_text(batch, word, j);
  }
  // A text tile without a real token has nothing to give.
  VSA_DEVICE void add_text(int batch, int word, int j) {
    const uint32_t text = ballot([&](int lane) {
      const int tile = (word + j) * kWordBits + lane;
      return tile < columns_.num_tiles() && columns_.is_text(tile) &&
             columns_.rows(columns_.place(tile), batch) != 0;
    });
    VSA_UNROLL
    for (int r = 0; r < Rows; ++r)
      each_lane([&](int lane) { wanted_[r][lane] |= tiles_[r] >= 0 && lane == j ? text : 0; });
  }

  // Whose turn each tile is: row r's if it wants it and the tile's place in its word is r modulo
  // Rows, or else the first row's that wants it. Returns how many tiles there are.
  VSA_DEVICE int arrange() {
    each_lane([&](int lane) {
      uint32_t open = 0;
      VSA_UNROLL
      for (int r = 0; r < Rows; ++r) open |= wanted_[r][lane];
      VSA_UNROLL
      for (int r = 0; r < Rows; ++r) {
        turns_[r][lane] = wanted_[r][lane] & every(r);
        open &= ~turns_[r][lane];
      }
      VSA_UNROLL
      for (int r = 0; r < Rows; ++r) {
        turns_[r][lane] |= wanted_[r][lane] & open;
        open &= ~wanted_[r][lane];
      }
    });
    int all = 0;
    VSA_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const int turns = sum([&](int lane) { return popcount(turns_[r][lane]); });
      total_[r] = Turns::of(turns);
      all += turns;
    }
    return all;
  }
  // Bits r, r + Rows, r + 2 Rows, ...
  VSA_DEVICE static constexpr uint32_t every(int r) {
    uint32_t bits = 0;
    for (int bit = r; bit < kWordBits; bit += Rows) bits |= 1u << bit;
    return bits;
  }

  // A row's number of turns, and what divides by it.
  struct Turns {
    static constexpr int kMost = Words * kWordBits;
    static_assert(int64_t{2} * kMost * (kMost + 1) * kMost < int64_t{1} << 31,
                  "quotients are exact");

    int count;
    uint32_t reciprocal;

    VSA_DEVICE static Turns of(int count) {
      return {count, count == 0 ? 0 : (1u << 31) / static_cast<unsigned>(count) + 1};
    }
    VSA_DEVICE int quotient(int n) const {
      return static_cast<int>(uint64_t{2u * static_cast<unsigned>(n)} * reciprocal >> 32);
    }
  };

  VSA_DEVICE void open(const Chunk& chunk) {
    const int buffer = next_ % Plan::kBuffers;
    plan_.empty[buffer].wait(next_ / Plan::kBuffers - 1);
    each_lane([&](int lane) {
      if (lane != 0) return;
      plan_.chunks[buffer].set(chunk);
      plan_.origins[buffer].set({origin_of(first_, chunk.head, chunk.work.batch),
                                 origin_of(second_, chunk.head, chunk.work.batch)});
    });
  }
  VSA_DEVICE void close() { plan_.full[next_++ % Plan::kBuffers].arrive_warp(); }

  // The tiles in order, those steps that fit into a chunk from step `begin` on, and who wants them.
  VSA_DEVICE void write_steps(int word, int begin) {
    const int buffer = next_ % Plan::kBuffers;
    int done[Rows] = {};
    for (int j = 0; j < Words; ++j) {
      uint32_t wanted[Rows], turns[Rows];
      VSA_UNROLL
      for (int r = 0; r < Rows; ++r) {
        wanted[r] = broadcast(wanted_[r], j);
        turns[r] = broadcast(turns_[r], j);
      }
      each_lane([&](int lane) {
        int row = -1, rank = 0;
        Turns total = {};
        uint32_t owners = 0;
        VSA_UNROLL
        for (int r = 0; r < Rows; ++r) {
          owners |= (wanted[r] >> lane & 1) << r;
          if ((turns[r] >> lane & 1) == 0) continue;
          row = r;
          rank = done[r] + popcount(turns[r] & below(lane));
          total = total_[r];
        }
        if (row < 0) return;
        const int place = place_of(row, rank, total) - begin;
        if (place < 0 || place >= Steps) return;
        plan_.steps[buffer][place].set(PlanStep::wanted((word + j) * kWordBits + lane, owners));
      });
      VSA_UNROLL
      for (int r = 0; r < Rows; ++r) done[r] += popcount(turns[r]);
    }
    warp_sync();
  }

  // How many turns come before turn `rank` of `row`, which has `total`: those r of any row with
  // (2 r + 1) total < (2 rank + 1) total_[row], or as many where that row comes first.
  VSA_DEVICE int place_of(int row, int rank, const Turns& total) const {
    int place = 0;
    VSA_UNROLL
    for (int other = 0; other < Rows; ++other)
      place += total.quotient((2 * rank + 1) * total_[other].count + total.count -
                              (other < row ? 0 : 1)) /
               2;
    return place;
  }

  // Where each consumer stops among the steps that were written and what it does `then`, and who
  // stops at each of them.
  VSA_DEVICE void write_stops(int batch, int steps, Stop::Kind then) {
    const int buffer = next_ % Plan::kBuffers;
    int counts[Rows] = {};
    for (int from = 0; from < steps; from += kWarpThreads) {
      const uint32_t there = steps - from < kWarpThreads ? below(steps - from) : ~0u;
      PerLane<PlanStep> written;
      PerLane<uint32_t> stopping;
      PerLane<uint64_t> rows;
      each_lane([&](int lane) {
        stopping[lane] = 0;
        written[lane] = {};
        if ((there >> lane & 1) == 0) return;
        written[lane] = plan_.steps[buffer][from + lane].get();
        rows[lane] = columns_.rows(columns_.place(written[lane].wanted_tile()), batch);
      });
      VSA_UNROLL
      for (int r = 0; r < Rows; ++r) {
        const uint32_t own = ballot([&](int lane) { return written[lane].flags() >> r & 1; });
        const uint32_t stops = own | (first_of_empty_windows(own) & there);
        const uint32_t drains = ballot([&](int lane) {
          const uint32_t before = own & below(lane);
          const int held = before ? first_slot_ + from + bitmap::highest(before) : held_[r];
          return (stops >> lane & 1) && first_slot_ + from + lane - held >= Second;
        });
        each_lane([&](int lane) {
          if ((stops >> lane & 1) == 0) return;
          const int slot = first_slot_ + from + lane, drain = drains >> lane & 1;
          Shared<Stop>* to = plan_.stops[buffer][r] + counts[r] + popcount(stops & below(lane)) +
                             popcount(drains & below(lane));
          if (drain) to->set(Stop::of(Stop::kDrain));
          to[drain].set(Stop::of(own >> lane & 1 ? Stop::kOwn : Stop::kPass,
                                 RingUse::of<First>(slot), RingUse::of<Second>(slot), rows[lane]));
          stopping[lane] |= 1u << r;
        });
        counts[r] += popcount(stops) + popcount(drains);
        if (own) held_[r] = first_slot_ + from + bitmap::highest(own);
      }
      each_lane([&](int lane) {
        if (there >> lane & 1)
          plan_.steps[buffer][from + lane].set(
              PlanStep::of(columns_, written[lane].wanted_tile(), stopping[lane]));
      });
    }
    first_slot_ += steps;
    each_lane([&](int lane) {
      if (lane != 0) return;
      VSA_UNROLL
      for (int r = 0; r < Rows; ++r) plan_.stops[buffer][r][counts[r]].set(Stop::of(then));
    });
  }
  // The first bit of each window whose bits are all 0.
  VSA_DEVICE static uint32_t first_of_empty_windows(uint32_t bits) {
    static_assert(kStopWindow == 8);
    bits |= bits >> 4;
    bits |= bits >> 2;
    bits |= bits >> 1;
    return ~bits & 0x01010101;
  }

  Plan& plan_;
  const TiledSequence& rows_;
  const TiledSequence& columns_;
  const TokenTensor& first_;
  const TokenTensor& second_;
  int tiles_[Rows];                               // of the item, -1 where a row has none
  PerLane<uint32_t> wanted_[Rows], turns_[Rows];  // a word in each lane
  Turns total_[Rows];
  int held_[Rows];  // the last slot of each row's own, of this item
  int next_ = 0, first_slot_ = 0;
};

}  // namespace vsa
