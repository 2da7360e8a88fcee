// SPDX-License-Identifier: Apache-2.0
// The scheduler warp: it writes the tile schedule of its block, a chunk ahead of producers and
// consumers.
//
// Rows are query tiles and columns key tiles; with the transposed bitmap rows are key tiles and
// columns query tiles. In both, text attends everything and everything attends text.
//
// Order. A ring holds few tiles, so consumers wait for each other unless each finds its next tile
// among the next few. So each tile is assigned to one row that selected it, and within the tiles
// that are put in order together the r-th of a row's n tiles sorts at (r + 1/2) / n. That
// interleaves the rows evenly. Where rows are to meet in as many tiles as can be, those that all of
// them selected come first.
#pragma once
#include <climits>

#include "kernels/schedule/tile_schedule.h"

namespace vsa {

// Words: of the bitmap, whose tiles are put in order together
// First, Second: stages of the rings that the tiles are loaded into; consumers hold their tile of
// the second while they take the next (kernels/schedule/rings.h)
// Sequence: of both sides; one of padded tiles has to say so
// SharedFirst: whether tiles that all rows selected come first
template <int Rows,
          int Words,
          int Loads,
          int First,
          int Second,
          class Sequence = TiledSequence,
          bool SharedFirst = false>
class TileScheduler {
 public:
  using TileSchedule = vsa::TileSchedule<Rows, Loads>;
  using Chunk = typename TileSchedule::Chunk;
  static_assert(Words <= kWarpThreads, "a lane holds one word of each row");

  // first, second: the tensors whose tiles the columns are
  VSA_DEVICE TileScheduler(TileSchedule& schedule,
                           const Sequence& rows,
                           const Sequence& columns,
                           const TokenTensor& first,
                           const TokenTensor& second)
      : schedule_(schedule), rows_(rows), columns_(columns), first_(first), second_(second) {}

  // All work tiles that this block takes of a pass over query tiles.
  template <class Params>
  VSA_DEVICE void add_query_tiles(const Params& p, int* tile_counter, GroupOrder order = {}) {
    const WorkList list(p.queries, Rows, p.batch, p.heads, p.query_axes, order);
    const int tiles = p.queries.grid.num_tiles(), sharing = p.heads / p.kv_heads;
    list.take_each(tile_counter, Rows, [&](const WorkTile& work) {
      add(work, bitmap_of(p.bitmap, work.batch, p.heads, work.head, tiles, words()),
          work.head / sharing);
    });
  }

  // A work tile. bitmaps: [heads, tiles of the rows' video, words]; the columns of the first bitmap
  // belong to `head`, of the next one to the head after it
  VSA_DEVICE void add(const WorkTile& work, const uint32_t* bitmaps, int head, int heads = 1) {
    begin_work_tile(work);
    const int64_t size = int64_t{rows_.grid.num_tiles()} * words();
    uint32_t flags = Chunk::kFirst;
    for (int h = 0; h < heads; ++h) {
      for (int word = 0; word * kWordBits < columns_.num_tiles(); word += Words) {
        const bool last = h == heads - 1 && (word + Words) * kWordBits >= columns_.num_tiles();
        find(work.batch, bitmaps + h * size, word);
        const int loads = arrange();
        int done = 0;
        do {
          const int here = loads - done < Loads ? loads - done : Loads;
          const bool ends = last && done + here == loads;
          if (here == 0 && !ends) break;
          open({work, head + h, here, flags});
          write_loads(word, done);
          write_steps(work.batch, here, ends ? ConsumerStep::kDone : ConsumerStep::kNextChunk);
          close();
          flags = 0;
          done += here;
        } while (done < loads);
      }
    }
  }

  VSA_DEVICE void finish() {
    open({{}, 0, 0, Chunk::kFinished});
    close();
  }

 private:
  VSA_DEVICE int words() const { return bitmap::words(columns_.grid.num_tiles()); }
  VSA_DEVICE static uint32_t below(int lane) { return (1u << lane) - 1; }

  VSA_DEVICE void begin_work_tile(const WorkTile& work) {
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

  // Assigns each tile to a row: to row r if that selected it and the tile's bit in its word is r
  // modulo Rows, else to the first row that selected it. Returns how many tiles there are.
  VSA_DEVICE int arrange() {
    each_lane([&](int lane) {
      uint32_t open = 0, shared = SharedFirst ? ~0u : 0;
      VSA_UNROLL
      for (int r = 0; r < Rows; ++r) {
        open |= wanted_[r][lane];
        shared &= wanted_[r][lane];
      }
      shared_[lane] = shared;
      open &= ~shared;
      VSA_UNROLL
      for (int r = 0; r < Rows; ++r) {
        assigned_[r][lane] = wanted_[r][lane] & open & every(r);
        open &= ~assigned_[r][lane];
      }
      VSA_UNROLL
      for (int r = 0; r < Rows; ++r) {
        assigned_[r][lane] |= wanted_[r][lane] & open;
        open &= ~wanted_[r][lane];
      }
    });
    shared_total_ = SharedFirst ? sum([&](int lane) { return popcount(shared_[lane]); }) : 0;
    int all = shared_total_;
    VSA_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const int assigned = sum([&](int lane) { return popcount(assigned_[r][lane]); });
      total_[r] = RowLoads::of(assigned);
      all += assigned;
    }
    return all;
  }
  // Bits r, r + Rows, r + 2 Rows, ...
  VSA_DEVICE static constexpr uint32_t every(int r) {
    uint32_t bits = 0;
    for (int bit = r; bit < kWordBits; bit += Rows) bits |= 1u << bit;
    return bits;
  }

  // How many tiles are assigned to a row, and what divides by that number.
  struct RowLoads {
    static constexpr int kMost = Words * kWordBits;
    static_assert(int64_t{2} * kMost * (kMost + 1) * kMost < int64_t{1} << 31,
                  "quotients are exact");

    int count;
    uint32_t reciprocal;

    VSA_DEVICE static RowLoads of(int count) {
      return {count, count == 0 ? 0 : (1u << 31) / static_cast<unsigned>(count) + 1};
    }
    VSA_DEVICE int quotient(int n) const {
      return static_cast<int>(uint64_t{2u * static_cast<unsigned>(n)} * reciprocal >> 32);
    }
  };

  VSA_DEVICE void open(const Chunk& chunk) {
    const int buffer = next_ % TileSchedule::kBuffers;
    schedule_.empty[buffer].wait(next_ / TileSchedule::kBuffers - 1);
    each_lane([&](int lane) {
      if (lane != 0) return;
      schedule_.chunks[buffer].set(chunk);
      schedule_.origins[buffer].set({origin_of(first_, chunk.head, chunk.work.batch),
                                     origin_of(second_, chunk.head, chunk.work.batch)});
    });
  }
  VSA_DEVICE void close() { schedule_.full[next_++ % TileSchedule::kBuffers].arrive_warp(); }

  // The tile loads in order, as many as fit into a chunk from load `begin` on, and which rows
  // selected each.
  VSA_DEVICE void write_loads(int word, int begin) {
    const int buffer = next_ % TileSchedule::kBuffers;
    int done[Rows] = {}, shared_done = 0;
    for (int j = 0; j < Words; ++j) {
      const uint32_t shared = SharedFirst ? broadcast(shared_, j) : 0;
      uint32_t wanted[Rows], assigned[Rows];
      VSA_UNROLL
      for (int r = 0; r < Rows; ++r) {
        wanted[r] = broadcast(wanted_[r], j);
        assigned[r] = broadcast(assigned_[r], j);
      }
      each_lane([&](int lane) {
        int row = -1, rank = 0;
        RowLoads total = {};
        uint32_t owners = 0;
        VSA_UNROLL
        for (int r = 0; r < Rows; ++r) {
          owners |= (wanted[r] >> lane & 1) << r;
          if ((assigned[r] >> lane & 1) == 0) continue;
          row = r;
          rank = done[r] + popcount(assigned[r] & below(lane));
          total = total_[r];
        }
        int place = shared_done + popcount(shared & below(lane)) - begin;
        if (!SharedFirst || (shared >> lane & 1) == 0) {
          if (row < 0) return;
          place = shared_total_ + place_of(row, rank, total) - begin;
        }
        if (place < 0 || place >= Loads) return;
        schedule_.loads[buffer][place].set(TileLoad::wanted((word + j) * kWordBits + lane, owners));
      });
      VSA_UNROLL
      for (int r = 0; r < Rows; ++r) done[r] += popcount(assigned[r]);
      shared_done += popcount(shared);
    }
    warp_sync();
  }

  // How many loads come before the one of this `rank` of `row`, which has `total`: all r of any row
  // with (2 r + 1) total < (2 rank + 1) total_[row], or as many where that row comes first.
  VSA_DEVICE int place_of(int row, int rank, const RowLoads& total) const {
    int place = 0;
    VSA_UNROLL
    for (int other = 0; other < Rows; ++other)
      place += total.quotient((2 * rank + 1) * total_[other].count + total.count -
                              (other < row ? 0 : 1)) /
               2;
    return place;
  }

  // The steps of each consumer for the loads that were written, ending with `then`; and into each
  // load which consumers have a step for it.
  VSA_DEVICE void write_steps(int batch, int loads, ConsumerStep::Kind then) {
    const int buffer = next_ % TileSchedule::kBuffers;
    int counts[Rows] = {};
    for (int from = 0; from < loads; from += kWarpThreads) {
      const uint32_t there = loads - from < kWarpThreads ? below(loads - from) : ~0u;
      PerLane<TileLoad> written;
      PerLane<uint32_t> waiting;
      PerLane<uint64_t> rows;
      each_lane([&](int lane) {
        waiting[lane] = 0;
        written[lane] = {};
        if ((there >> lane & 1) == 0) return;
        written[lane] = schedule_.loads[buffer][from + lane].get();
        rows[lane] = columns_.rows(columns_.place(written[lane].wanted_tile()), batch);
      });
      VSA_UNROLL
      for (int r = 0; r < Rows; ++r) {
        const uint32_t computed = ballot([&](int lane) { return written[lane].flags() >> r & 1; });
        const uint32_t steps = computed | (first_of_empty_windows(computed) & there);
        const uint32_t flushes = ballot([&](int lane) {
          const uint32_t before = computed & below(lane);
          const int held = before ? first_number_ + from + bitmap::highest(before) : held_[r];
          return (steps >> lane & 1) && first_number_ + from + lane - held >= Second;
        });
        each_lane([&](int lane) {
          if ((steps >> lane & 1) == 0) return;
          const int number = first_number_ + from + lane, flush = flushes >> lane & 1;
          Shared<ConsumerStep>* to = schedule_.steps[buffer][r] + counts[r] +
                                     popcount(steps & below(lane)) +
                                     popcount(flushes & below(lane));
          if (flush) to->set(ConsumerStep::of(ConsumerStep::kFlush));
          to[flush].set(ConsumerStep::of(
              computed >> lane & 1 ? ConsumerStep::kCompute : ConsumerStep::kSkip,
              RingUse::of<First>(number), RingUse::of<Second>(number), rows[lane]));
          waiting[lane] |= 1u << r;
        });
        counts[r] += popcount(steps) + popcount(flushes);
        if (computed) held_[r] = first_number_ + from + bitmap::highest(computed);
      }
      each_lane([&](int lane) {
        if (there >> lane & 1)
          schedule_.loads[buffer][from + lane].set(TileLoad::of(
              columns_, written[lane].wanted_tile(), waiting[lane], written[lane].flags()));
      });
    }
    first_number_ += loads;
    each_lane([&](int lane) {
      if (lane != 0) return;
      VSA_UNROLL
      for (int r = 0; r < Rows; ++r)
        schedule_.steps[buffer][r][counts[r]].set(ConsumerStep::of(then));
    });
  }
  // The first bit of each window whose bits are all 0.
  VSA_DEVICE static uint32_t first_of_empty_windows(uint32_t bits) {
    static_assert(kStepWindow == 8);
    bits |= bits >> 4;
    bits |= bits >> 2;
    bits |= bits >> 1;
    return ~bits & 0x01010101;  // bits 0, 8, 16 and 24: where windows begin
  }

  TileSchedule& schedule_;
  const Sequence& rows_;
  const Sequence& columns_;
  const TokenTensor& first_;
  const TokenTensor& second_;
  int tiles_[Rows];                                  // of the work tile, -1 where a row has none
  PerLane<uint32_t> wanted_[Rows], assigned_[Rows];  // a word in each lane
  PerLane<uint32_t> shared_;  // of those that all rows selected, where these come first
  RowLoads total_[Rows];
  int shared_total_ = 0;
  int held_[Rows];  // each row's last load to compute on, in this work tile
  int next_ = 0, first_number_ = 0;
};

}  // namespace vsa
