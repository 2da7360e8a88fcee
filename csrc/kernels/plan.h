// SPDX-License-Identifier: Apache-2.0
// The plan of a block's work: for each item the tiles that its rows want, each once, in which order
// they are loaded, and where each consumer stops. One warp, the planner, writes it a chunk ahead of
// the others (kernels/planner.h).
//
//   barrier   arrives                                 waits
//   full      all lanes of the planner                producers, consumers
//   empty     each producer, all of every consumer    planner
#pragma once
#include "kernels/work_list.h"
#include "tile/ring.h"

namespace vsa {

// A tile and who stops there. Where it lies is worked out by the planner, which has 32 lanes; a
// producer is one thread, and nothing is cheap between two of its copies.
struct PlanStep {
  static constexpr int kClip = 48, kRegion = 52, kFlags = 56;
  static constexpr int kMostTiles = 1 << 16;  // along an axis

  uint64_t bits;  // from the lowest: w, h, t in tiles, 16 each, text along w; Clip, Region, flags

  // flags: bit w: consumer w waits for the tile's slot, and lets go of it
  VSA_DEVICE static PlanStep of(const TiledSequence& sequence, int tile, uint32_t flags) {
    const TilePlace at = sequence.place(tile);
    const Axes in_tiles = at.region == Region::Video ? sequence.grid.in_tiles(tile)
                                                     : Axes{0, 0, at.first.w / kTileRows};
    return {static_cast<uint64_t>(in_tiles.w) | static_cast<uint64_t>(in_tiles.h) << 16 |
            static_cast<uint64_t>(in_tiles.t) << 32 | uint64_t{at.clip} << kClip |
            static_cast<uint64_t>(at.region) << kRegion | uint64_t{flags} << kFlags};
  }

  // Before its place is worked out: a tile's number, and as flags who wants it.
  VSA_DEVICE static PlanStep wanted(int tile, uint32_t owners) {
    return {static_cast<uint32_t>(tile) | uint64_t{owners} << kFlags};
  }
  VSA_DEVICE int wanted_tile() const { return static_cast<int>(bits); }

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

// A use of a stage of a ring, and the barrier and phase that say it is full (kernels/slots.h).
struct RingUse {
  static constexpr int kRounds = 8;  // barriers of a stage, in turn

  int stage, barrier, phase;

  template <int Stages>
  VSA_DEVICE static RingUse of(int slot) {
    const int stage = Ring<Stages>::stage(slot), use = Ring<Stages>::use(slot);
    return {stage, stage * kRounds + use % kRounds, use / kRounds};
  }
};

// What a consumer does next. Slot n of one ring goes with slot n of the other.
struct alignas(16) Stop {
  enum Kind : uint32_t {
    kOwn,    // takes the slot
    kPass,   // lets go of the slot, so that it never passes over more uses than barriers tell apart
    kDrain,  // lets go of what it holds: the next slot comes only after that
    kPage,   // goes on with the next chunk
    kEnd     // the item has no more
  };

  uint32_t places;  // 8 bits each, from the lowest: stage and barrier of the first and second ring
  uint32_t phases;  // kind 8, phases 12 each
  uint64_t rows;    // of the tile that are tokens

  VSA_DEVICE static Stop of(Kind kind, RingUse first, RingUse second, uint64_t rows) {
    return {static_cast<uint32_t>(first.stage | first.barrier << 8 | second.stage << 16 |
                                  second.barrier << 24),
            static_cast<uint32_t>(kind | (first.phase & 0xfff) << 8 |
                                  static_cast<uint32_t>(second.phase) << 20),
            rows};
  }
  VSA_DEVICE static Stop of(Kind kind) { return {0, kind, 0}; }

  VSA_DEVICE bool is(Kind kind) const { return (phases & 0xff) == kind; }
  VSA_DEVICE RingUse first() const {
    return {static_cast<int>(places & 0xff), static_cast<int>(places >> 8 & 0xff),
            static_cast<int>(phases >> 8 & 0xfff)};
  }
  VSA_DEVICE RingUse second() const {
    return {static_cast<int>(places >> 16 & 0xff), static_cast<int>(places >> 24),
            static_cast<int>(phases >> 20)};
  }
};

// Consumers stop in every window of so many steps, so that they pass over this many slots at most.
constexpr int kStopWindow = 8, kMostPassed = 2 * (kStopWindow - 1);

// Steps of a chunk, in two buffers. What the producers read again for every step is not in their
// registers, of which they have few.
template <int Consumers, int Steps>
struct Plan {
  static constexpr int kBuffers = 2;
  // Of a consumer: a drain takes the place of steps passed over, but for a chunk's first; and its
  // end.
  static constexpr int kStops = Steps + 2;

  struct Chunk {
    Work work;
    int head;   // of the columns
    int steps;  // 0 where nobody wants anything
    uint32_t flags;

    enum Flags : uint32_t { kFirst = 1, kStop = 2 };  // of its item; there are no more items
    VSA_DEVICE bool first() const { return flags & kFirst; }
    VSA_DEVICE bool stop() const { return flags & kStop; }
  };

  // Of the two tensors whose tiles travel together.
  struct alignas(16) Origins {
    HeadOrigin first, second;
  };

  Shared<Origins> origins[kBuffers];
  Shared<PlanStep> steps[kBuffers][Steps];  // flags: who stops there
  Shared<Stop> stops[kBuffers][Consumers][kStops];
  Shared<Chunk> chunks[kBuffers];
  Mbarrier full[kBuffers];
  Mbarrier empty[kBuffers];

  VSA_DEVICE void init(int producers) {
    for (int i = 0; i < kBuffers; ++i) {
      full[i].init(kWarpThreads, "plan_full", i);
      empty[i].init(producers + Consumers * kWarpgroupThreads, "plan_empty", i);
      label(origins[i], "origins", i);
      label(steps[i], "steps", i);
      label(stops[i], "stops", i);
      label(chunks[i], "chunks", i);
    }
  }

  VSA_DEVICE Chunk chunk(int n) const { return chunks[n % kBuffers].get(); }
  VSA_DEVICE PlanStep step(int n, int i) const { return steps[n % kBuffers][i].get(); }

  // ---- a producer, one thread ----

  // Calls load(work) for each item.
  template <class Load>
  VSA_DEVICE void for_each_item(Load load) {
    for_each_chunk([&](int, const Chunk& chunk) {
      if (chunk.first()) load(chunk.work);
    });
  }
  // Calls load(n, i) for each step i of each chunk n.
  template <class Load>
  VSA_DEVICE void for_each_step(Load load) {
    for_each_chunk([&](int n, const Chunk& chunk) {
      for (int i = 0; i < chunk.steps; ++i) load(n, i);
    });
  }

  // A tile of one of the two tensors.
  template <int D>
  VSA_DEVICE void load(int n,
                       const TilePlace& at,
                       Tile<D>& tile,
                       const TokenTensor& tokens,
                       HeadOrigin Origins::* origin,
                       Mbarrier& barrier) const {
    if (at.region == Region::Video) {
      const Origins from = origins[n % kBuffers].get();
      load_tile(tile, tokens.video.map, (from.*origin).box(at), barrier, CacheHint::EvictLast);
    } else {
      const Chunk of = chunk(n);
      const TileBox box = box_of(tokens, at, of.head, of.work.batch);
      load_tile(tile, box.map, box.at, barrier, CacheHint::EvictLast);
    }
  }

 private:
  template <class Each>
  VSA_DEVICE void for_each_chunk(Each each) {
    for (int n = 0;; ++n) {
      full[n % kBuffers].wait(n / kBuffers);
      const Chunk of = chunk(n);
      if (of.stop()) break;
      each(n, of);
      empty[n % kBuffers].arrive_one();
    }
  }
};

}  // namespace vsa
