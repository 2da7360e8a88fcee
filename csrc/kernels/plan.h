// SPDX-License-Identifier: Apache-2.0
// The plan of a block's work: for each item the tiles that its rows want, each once, and in which
// order they are loaded. One warp, the planner, writes it a chunk ahead of the producer.
//
// Rows are query tiles and columns key tiles; in the transposed selection it is the other way
// round, and the same holds: text attends everything and is attended by everything.
//
// Order. A ring holds few tiles, so consumers wait for each other unless each finds its next tile
// among the next few. Every tile is one row's turn, that of a row that wants it; within a chunk the
// r-th of a row's n turns comes at (r + 1/2) / n, so that all rows advance alike.
//
//   barrier   arrives                    waits
//   full      all lanes of the planner   producer
//   empty     producer                   planner
#pragma once
#include "kernels/params.h"
#include "prim/warp.h"
#include "tile/tile.h"

namespace vsa {

// A tile and who wants it. Where it lies is worked out by the planner, which has 32 lanes; the
// producer is one thread, and nothing is cheap between two of its copies.
struct PlanStep {
  static constexpr int kClip = 48, kRegion = 52, kFlags = 56;
  static constexpr int kMostTiles = 1 << 16;  // along an axis

  uint64_t bits;  // from the lowest: w, h, t in tiles, 16 each, text along w; Clip, Region, flags

  // flags: of the slot that the tile is loaded into (kernels/slots.h)
  VSA_DEVICE static PlanStep of(const TiledSequence& sequence, int tile, uint32_t flags) {
    const TilePlace at = sequence.place(tile);
    const Axes in_tiles = at.region == Region::Video ? sequence.grid.in_tiles(tile)
                                                     : Axes{0, 0, at.first.w / kTileRows};
    return {static_cast<uint64_t>(in_tiles.w) | static_cast<uint64_t>(in_tiles.h) << 16 |
            static_cast<uint64_t>(in_tiles.t) << 32 | uint64_t{at.clip} << kClip |
            static_cast<uint64_t>(at.region) << kRegion | uint64_t{flags} << kFlags};
  }

  VSA_DEVICE uint32_t flags() const { return static_cast<uint32_t>(bits >> kFlags); }
  VSA_DEVICE TilePlace place(const TiledSequence& sequence) const {
    const int w = bits & 0xffff, h = bits >> 16 & 0xffff, t = bits >> 32 & 0xffff;
    const Axes& tile = sequence.grid.tile;
    const auto region = static_cast<Region>(bits >> kRegion & 3);
    if (region == Region::Video)
      return {region,
              -1,
              {t * tile.t, h * tile.h, w * tile.w},
              static_cast<unsigned>(bits >> kClip & 7)};
    return {region,
            region == Region::Prefix ? w : sequence.prefix_tiles() + w,
            {0, 0, w * kTileRows},
            kWhole};
  }
  // The tile's number.
  VSA_DEVICE int tile(const TiledSequence& sequence) const {
    const int w = bits & 0xffff, h = bits >> 16 & 0xffff, t = bits >> 32 & 0xffff;
    const Grid& grid = sequence.grid;
    const auto region = static_cast<Region>(bits >> kRegion & 3);
    if (region == Region::Video) return (t * grid.tiles.h + h) * grid.tiles.w + w;
    return grid.num_tiles() + (region == Region::Prefix ? w : sequence.prefix_tiles() + w);
  }
};

// Steps of a chunk, in two buffers. What the producer reads again for every step is not in its
// registers, of which it has few.
template <int Steps>
struct Plan {
  static constexpr int kBuffers = 2;

  struct Chunk {
    Work work;
    int head;   // of the columns
    int steps;  // 0 where nobody wants anything
    uint32_t flags;

    VSA_DEVICE bool first() const { return flags & kFirst; }
    VSA_DEVICE bool stop() const { return flags & kStop; }
  };
  enum Flags : uint32_t { kFirst = 1, kStop = 2 };  // of the item; there are no more items

  // Of the two tensors whose tiles travel together.
  struct alignas(16) Origins {
    HeadOrigin first, second;
  };

  Shared<Origins> origins[kBuffers];
  Shared<PlanStep> steps[kBuffers][Steps];
  Shared<Chunk> chunks[kBuffers];
  Mbarrier full[kBuffers];
  Mbarrier empty[kBuffers];

  VSA_DEVICE void init() {
    for (int i = 0; i < kBuffers; ++i) {
      full[i].init(kWarpThreads, "plan_full", i);
      empty[i].init(1, "plan_empty", i);
      label(origins[i], "origins", i);
      label(steps[i], "steps", i);
      label(chunks[i], "chunks", i);
    }
  }

  // ---- producer, one thread: chunks n = 0, 1, 2, ... ----

  VSA_DEVICE Chunk take(int n) {
    full[n % kBuffers].wait(n / kBuffers);
    return chunk(n);
  }
  VSA_DEVICE Chunk chunk(int n) const { return chunks[n % kBuffers].get(); }
  VSA_DEVICE PlanStep step(int n, int i) const { return steps[n % kBuffers][i].get(); }
  VSA_DEVICE void give_back(int n) { empty[n % kBuffers].arrive_one(); }

  // Rows that are tokens.
  VSA_DEVICE uint64_t rows(int n, const TiledSequence& columns, const TilePlace& at) const {
    if (at.region == Region::Video) return columns.grid.rows[at.clip];
    return columns.rows(at, chunk(n).work.batch);
  }
  // A tile of both tensors.
  template <int D>
  VSA_DEVICE void load(int n,
                       const TilePlace& at,
                       Tile<D>& first,
                       const TokenTensor& first_tokens,
                       Tile<D>& second,
                       const TokenTensor& second_tokens,
                       Mbarrier& barrier) const {
    if (at.region == Region::Video) {
      const Origins from = origins[n % kBuffers].get();
      load_tile(first, first_tokens.video.map, from.first.box(at), barrier, CacheHint::EvictLast);
      load_tile(second, second_tokens.video.map, from.second.box(at), barrier,
                CacheHint::EvictLast);
    } else {
      const Chunk of = chunk(n);
      const TileBox a = box_of(first_tokens, at, of.head, of.work.batch);
      const TileBox b = box_of(second_tokens, at, of.head, of.work.batch);
      load_tile(first, a.map, a.at, barrier, CacheHint::EvictLast);
      load_tile(second, b.map, b.at, barrier, CacheHint::EvictLast);
    }
  }
};

// Words: of the bitmap, whose tiles are put in order together
template <int Rows, int Words, int Steps>
class Planner {
 public:
  static_assert(Words <= kWarpThreads, "a lane holds one word of each row");
  static constexpr uint32_t kLast = 1u << Rows;  // of slots
  using Chunk = typename Plan<Steps>::Chunk;
  using Flags = typename Plan<Steps>::Flags;

  // first, second: the tensors whose tiles the columns are
  VSA_DEVICE Planner(Plan<Steps>& plan,
                     const TiledSequence& rows,
                     const TiledSequence& columns,
                     const TokenTensor& first,
                     const TokenTensor& second)
      : plan_(plan), rows_(rows), columns_(columns), first_(first), second_(second) {}

  // What a block is dealt of a pass over query tiles.
  template <class Params>
  VSA_DEVICE void add_query_tiles(const Params& p) {
    const WorkList list(p.queries, Rows, p.batch, p.heads, p.query_axes);
    const int tiles = p.queries.grid.num_tiles(), sharing = p.heads / p.kv_heads;
    for (int item = block_index(); item < list.items; item += block_count()) {
      const Work work = list.work(item, Rows);
      add(work, bitmap_of(p.selected, work.batch, p.heads, work.head, tiles, words()),
          work.head / sharing);
    }
  }

  // An item. bitmaps: [heads, tiles of the rows' video, words]; the columns of the first are those
  // of `head`, of the next those of the head after it
  VSA_DEVICE void add(const Work& work, const uint32_t* bitmaps, int head, int heads = 1) {
    const int64_t size = int64_t{rows_.grid.num_tiles()} * words();
    int left = 0;
    for (int h = 0; h < heads; ++h) left += count(work, bitmaps + h * size);
    uint32_t flags = Flags::kFirst;
    if (left == 0) {
      open({work, head, 0, flags});
      return close();
    }
    for (int h = 0; h < heads; ++h) {
      for (int word = 0; word * kWordBits < columns_.num_tiles(); word += Words) {
        find(work, bitmaps + h * size, word, Words);
        arrange();
        const int steps = count();
        for (int done = 0; done < steps; done += Steps) {
          const int here = steps - done < Steps ? steps - done : Steps;
          left -= here;
          open({work, head + h, here, flags});
          write(word, done, left == 0 ? done + here - 1 : -1);
          close();
          flags = 0;
        }
      }
    }
  }

  VSA_DEVICE void stop() {
    open({{}, 0, 0, Flags::kStop});
    close();
  }

 private:
  VSA_DEVICE int words() const { return bitmap::words(columns_.grid.num_tiles()); }

  // The rows' words from `word` on, one in each of `wanted` lanes.
  VSA_DEVICE void find(const Work& work, const uint32_t* bits, int word, int wanted) {
    const int tiles = columns_.grid.num_tiles();
    VSA_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const int tile = tile_at(rows_, work.first_place + r, work.axis);
      const bool text = tile >= 0 && rows_.is_text(tile);
      each_lane([&](int lane) {
        const int at = word + lane, left = tiles - at * kWordBits;
        const bool there = tile >= 0 && lane < wanted && left > 0;
        own_[r][lane] = !there ? 0
                        : text ? left < kWordBits ? (1u << left) - 1 : ~0u
                               : load_global(bits + int64_t{tile} * words() + at);
      });
    }
    for (int j = tiles / kWordBits > word ? tiles / kWordBits - word : 0;
         j < wanted && (word + j) * kWordBits < columns_.num_tiles(); ++j)
      add_text(work, word, j);
  }
  // A text tile without a real token has nothing to give.
  VSA_DEVICE void add_text(const Work& work, int word, int j) {
    const uint32_t text = ballot([&](int lane) {
      const int tile = (word + j) * kWordBits + lane;
      return tile < columns_.num_tiles() && columns_.is_text(tile) &&
             columns_.rows(columns_.place(tile), work.batch) != 0;
    });
    VSA_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const bool there = work.first_place + r < rows_.num_tiles();
      each_lane([&](int lane) { own_[r][lane] |= there && lane == j ? text : 0; });
    }
  }

  VSA_DEVICE uint32_t anyones(int lane) {
    uint32_t any = 0;
    VSA_UNROLL
    for (int r = 0; r < Rows; ++r) any |= own_[r][lane];
    return any;
  }
  VSA_DEVICE int count() {
    return sum([&](int lane) { return popcount(anyones(lane)); });
  }
  VSA_DEVICE int count(const Work& work, const uint32_t* bits) {
    int steps = 0;
    for (int word = 0; word * kWordBits < columns_.num_tiles(); word += kWarpThreads) {
      find(work, bits, word, kWarpThreads);
      steps += count();
    }
    return steps;
  }

  VSA_DEVICE void open(const Chunk& chunk) {
    const int buffer = next_ % plan_.kBuffers;
    plan_.empty[buffer].wait(next_ / plan_.kBuffers - 1);
    each_lane([&](int lane) {
      if (lane != 0) return;
      plan_.chunks[buffer].set(chunk);
      plan_.origins[buffer].set({origin_of(first_, chunk.head, chunk.work.batch),
                                 origin_of(second_, chunk.head, chunk.work.batch)});
    });
  }
  VSA_DEVICE void close() { plan_.full[next_++ % plan_.kBuffers].arrive_warp(); }

  // Whose turn each tile is: row r's if it wants it and the tile's place in its word is r modulo
  // Rows, or else the first row's that wants it.
  VSA_DEVICE void arrange() {
    each_lane([&](int lane) {
      uint32_t open = anyones(lane);
      VSA_UNROLL
      for (int r = 0; r < Rows; ++r) {
        turns_[r][lane] = own_[r][lane] & every(r);
        open &= ~turns_[r][lane];
      }
      VSA_UNROLL
      for (int r = 0; r < Rows; ++r) {
        turns_[r][lane] |= own_[r][lane] & open;
        open &= ~own_[r][lane];
      }
    });
  }

  // Those steps of the words that fit into a chunk, from step `begin` on. last: ends the item
  VSA_DEVICE void write(int word, int begin, int last) {
    int total[Rows], done[Rows] = {};
    VSA_UNROLL
    for (int r = 0; r < Rows; ++r)
      total[r] = sum([&](int lane) { return popcount(turns_[r][lane]); });
    for (int j = 0; j < Words; ++j) {
      uint32_t wanted[Rows], turn[Rows];
      VSA_UNROLL
      for (int r = 0; r < Rows; ++r) {
        wanted[r] = broadcast(own_[r], j);
        turn[r] = broadcast(turns_[r], j);
      }
      each_lane([&](int lane) {
        uint32_t owners = 0;
        int place = -1;
        VSA_UNROLL
        for (int r = 0; r < Rows; ++r) {
          owners |= (wanted[r] >> lane & 1) << r;
          if (turn[r] >> lane & 1)
            place = place_of(r, done[r] + popcount(turn[r] & ((1u << lane) - 1)), total);
        }
        if (place < begin || place >= begin + Steps) return;
        plan_.steps[next_ % plan_.kBuffers][place - begin].set(PlanStep::of(
            columns_, (word + j) * kWordBits + lane, owners | (place == last ? kLast : 0)));
      });
      VSA_UNROLL
      for (int r = 0; r < Rows; ++r) done[r] += popcount(turn[r]);
    }
  }

  // Bits r, r + Rows, r + 2 Rows, ...
  VSA_DEVICE static constexpr uint32_t every(int r) {
    uint32_t bits = 0;
    for (int bit = r; bit < kWordBits; bit += Rows) bits |= 1u << bit;
    return bits;
  }

  // How many turns come before turn `rank` of `row`: those r of another row with
  // (2 r + 1) total[row] < (2 rank + 1) total[other], or as many where the other row comes first.
  VSA_DEVICE static int place_of(int row, int rank, const int (&total)[Rows]) {
    int place = rank;
    VSA_UNROLL
    for (int other = 0; other < Rows; ++other) {
      if (other == row || total[other] == 0) continue;
      const unsigned limit = (2 * rank + 1) * total[other] - (other < row ? 0 : 1);
      place += static_cast<int>((limit / static_cast<unsigned>(total[row]) + 1) / 2);
    }
    return place;
  }

  Plan<Steps>& plan_;
  const TiledSequence& rows_;
  const TiledSequence& columns_;
  const TokenTensor& first_;
  const TokenTensor& second_;
  PerLane<uint32_t> own_[Rows], turns_[Rows];  // a word in each lane
  int next_ = 0;
};

}  // namespace vsa
