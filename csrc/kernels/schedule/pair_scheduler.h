// SPDX-License-Identifier: Apache-2.0
// The scheduler warp of a kernel whose two consumers take two tiles at once. A load is a pair: any
// two tiles of one consumer's list, or of both lists.
//
// Order. Tiles that both rows selected come first, in pairs, then those of each list in pairs of
// their own, interleaved evenly. What a row selected is so in as few pairs as it can be: if the
// tiles of both are odd in number, the last of them goes to each row's own, where it finds another
// or is half of the last pair.
#pragma once
#include "kernels/schedule/tile_scheduler.h"

namespace vsa {

// Words: of the bitmap, whose tiles are put in order together
// Pairs: of a chunk; Stages: of both rings
template <int Words, int Pairs, int Stages, class Sequence>
class PairScheduler
    : TileScheduler<2, Words, Pairs, Stages, Stages, Sequence, false, PairSchedule<2, Pairs>> {
  using Base =
      TileScheduler<2, Words, Pairs, Stages, Stages, Sequence, false, PairSchedule<2, Pairs>>;
  using typename Base::Chunk;
  static constexpr int kRows = 2, kNothing = -1;
  static_assert(Pairs <= kWarpThreads, "a lane writes the steps of one pair");

 public:
  using Base::Base;
  using Base::finish;

  template <class Params>
  VSA_DEVICE void add_query_tiles(const Params& p, int* tile_counter, GroupOrder order) {
    const WorkList list(p.queries, kRows, p.batch, p.heads, p.query_axes, order);
    const int tiles = p.queries.grid.num_tiles(), sharing = p.heads / p.kv_heads;
    list.take_each(tile_counter, kRows, [&](const WorkTile& work) {
      add(work, bitmap_of(p.bitmap, work.batch, p.heads, work.head, tiles, this->words()),
          work.head / sharing);
    });
  }

 private:
  VSA_DEVICE void add(const WorkTile& work, const uint32_t* bits, int head) {
    this->begin_work_tile(work);
    uint32_t flags = Chunk::kFirst;
    const int columns = this->columns_.num_tiles();
    for (int word = 0; word * kWordBits < columns; word += Words) {
      const bool last = (word + Words) * kWordBits >= columns;
      this->find(work.batch, bits, word);
      const int pairs = arrange();
      int done = 0;
      do {
        const int here = pairs - done < Pairs ? pairs - done : Pairs;
        const bool ends = last && done + here == pairs;
        if (here == 0 && !ends) break;
        this->open({work, head, here, flags});
        write_pairs(word, done);
        write_steps(work.batch, here, ends ? ConsumerStep::kDone : ConsumerStep::kNextChunk);
        this->close();
        flags = 0;
        done += here;
      } while (done < pairs);
    }
  }

  // What both rows selected, what one did, and how many pairs that makes.
  VSA_DEVICE int arrange() {
    each_lane([&](int lane) {
      const uint32_t shared = this->wanted_[0][lane] & this->wanted_[1][lane];
      this->shared_[lane] = shared;
      for (int r = 0; r < kRows; ++r) this->assigned_[r][lane] = this->wanted_[r][lane] & ~shared;
    });
    const int shared = sum([&](int lane) { return popcount(this->shared_[lane]); });
    VSA_UNROLL
    for (int r = 0; r < kRows; ++r)
      own_[r] = sum([&](int lane) { return popcount(this->assigned_[r][lane]); });
    const bool split = shared % 2 == 1 && (own_[0] % 2 == 1 || own_[1] % 2 == 1);
    given_ = split ? shared - 1 : -1;
    shared_pairs_ = (shared + 1) / 2 - split;
    int pairs = shared_pairs_;
    VSA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      this->total_[r] = Base::RowLoads::of((own_[r] + split + 1) / 2);
      pairs += this->total_[r].count;
    }
    return pairs;
  }

  // The pairs in order, as many as fit into a chunk from pair `begin` on, and which rows want each.
  VSA_DEVICE void write_pairs(int word, int begin) {
    const int buffer = this->next_ % Base::TileSchedule::kBuffers;
    Shared<TileLoad>* loads = this->schedule_.loads[buffer];
    each_lane([&](int lane) {
      if (lane >= Pairs) return;
      loads[2 * lane].set(TileLoad::wanted(kNothing, 0));
      loads[2 * lane + 1].set(TileLoad::wanted(kNothing, 0));
    });
    warp_sync();
    int done[kRows] = {}, shared_done = 0;
    for (int j = 0; j < Words; ++j) {
      const uint32_t shared = broadcast(this->shared_, j);
      uint32_t own[kRows];
      VSA_UNROLL
      for (int r = 0; r < kRows; ++r) own[r] = broadcast(this->assigned_[r], j);
      each_lane([&](int lane) {
        const uint32_t before = this->below(lane);
        const int tile = (word + j) * kWordBits + lane;
        const auto put = [&](int pair, int half, uint32_t owners) {
          if (pair >= begin && pair < begin + Pairs)
            loads[2 * (pair - begin) + half].set(TileLoad::wanted(tile, owners));
        };
        const auto put_own = [&](int r, int rank) {
          put(shared_pairs_ + this->place_of(r, rank / 2, this->total_[r]), rank % 2, 1u << r);
        };
        const int rank = shared_done + popcount(shared & before);
        const bool both = shared >> lane & 1, given = both && rank == given_;
        if (both && !given) put(rank / 2, rank % 2, 3);
        VSA_UNROLL
        for (int r = 0; r < kRows; ++r) {
          if (given)
            put_own(r, own_[r]);
          else if (own[r] >> lane & 1)
            put_own(r, done[r] + popcount(own[r] & before));
        }
      });
      VSA_UNROLL
      for (int r = 0; r < kRows; ++r) done[r] += popcount(own[r]);
      shared_done += popcount(shared);
    }
    warp_sync();
  }

  // The steps of each consumer for the pairs that were written, ending with `then`; and into each
  // load which consumers have a step for it.
  VSA_DEVICE void write_steps(int batch, int pairs, ConsumerStep::Kind then) {
    const int buffer = this->next_ % Base::TileSchedule::kBuffers;
    auto& schedule = this->schedule_;
    PerLane<TileLoad> written[2];
    PerLane<uint32_t> waiting;
    PerLane<bool> masked;
    each_lane([&](int lane) {
      waiting[lane] = 0;
      for (int half = 0; half < 2; ++half) written[half][lane] = TileLoad::wanted(kNothing, 0);
      if (lane >= pairs) return;
      PairRows rows;
      for (int half = 0; half < 2; ++half) {
        const TileLoad load = schedule.loads[buffer][2 * lane + half].get();
        written[half][lane] = load;
        const int tile = load.wanted_tile();
        rows.of_tiles[half] =
            tile == kNothing ? 0 : this->columns_.rows(this->columns_.place(tile), batch);
      }
      masked[lane] = (rows.of_tiles[0] & rows.of_tiles[1]) != ~uint64_t{0};
      if (masked[lane]) schedule.rows[buffer][lane].set(rows);
    });
    const uint32_t there = pairs < kWarpThreads ? this->below(pairs) : ~0u;
    VSA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const uint32_t computed =
          ballot([&](int lane) { return written[0][lane].flags() >> r & 1; }) & there;
      const uint32_t steps = computed | (this->first_of_empty_windows(computed) & there);
      const uint32_t flushes = ballot([&](int lane) {
        const uint32_t before = computed & this->below(lane);
        const int held = before ? this->first_number_ + bitmap::highest(before) : this->held_[r];
        return (steps >> lane & 1) && this->first_number_ + lane - held >= Stages;
      });
      each_lane([&](int lane) {
        Shared<PairStep>* all = schedule.steps[buffer][r];
        if (lane == 0) all[popcount(steps) + popcount(flushes)].set(PairStep::of(then));
        if ((steps >> lane & 1) == 0) return;
        const bool flush = flushes >> lane & 1;
        Shared<PairStep>* to =
            all + popcount(steps & this->below(lane)) + popcount(flushes & this->below(lane));
        if (flush) to->set(PairStep::of(ConsumerStep::kFlush));
        to[flush].set(
            PairStep::of(computed >> lane & 1 ? ConsumerStep::kCompute : ConsumerStep::kSkip,
                         RingUse::of<Stages>(this->first_number_ + lane), lane, masked[lane]));
        waiting[lane] |= 1u << r;
      });
      if (computed) this->held_[r] = this->first_number_ + bitmap::highest(computed);
    }
    each_lane([&](int lane) {
      if (lane >= pairs) return;
      const uint32_t owners = written[0][lane].flags();
      for (int half = 0; half < 2; ++half) {
        const int tile = written[half][lane].wanted_tile();
        schedule.loads[buffer][2 * lane + half].set(
            tile == kNothing ? TileLoad::nothing(waiting[lane], owners)
                             : TileLoad::of(this->columns_, tile, waiting[lane], owners));
      }
    });
    this->first_number_ += pairs;
  }

  int own_[kRows];    // tiles that only this row selected
  int given_ = -1;    // rank of the shared tile that goes to each row's own, or -1
  int shared_pairs_;  // before those of single rows
};

}  // namespace vsa
