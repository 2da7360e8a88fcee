// SPDX-License-Identifier: Apache-2.0
// The tile schedule of a block: for each work tile the tile loads, which are the union of what its
// rows selected, and for each consumer its steps, which say what to do with the tiles that arrive.
// One warp, the scheduler, writes it a chunk ahead of producers and consumers
// (kernels/schedule/tile_scheduler.h).
//
//   barrier   arrives                                        waits
//   full      all lanes of the scheduler warp                producers, consumers
//   empty     each producer, all threads of every consumer   scheduler warp
//             and of the reducer, where there is one
#pragma once
#include "kernels/schedule/work_list.h"
#include "tile/ring.h"

namespace vsa {

// A tile to load, and the consumers that have a step for it. The scheduler warp works out where the
// tile lies, since it has 32 lanes: a producer is one thread, and every instruction between two of
// its copies counts.
struct TileLoad {
  static constexpr int kClip = 48, kRegion = 52, kFlags = 56, kOwners = 60;
  static constexpr int kMostTiles = 1 << 16;  // along an axis

  // From the lowest: w, h, t in tiles, 16 each, text along w; Clip, Region, flags; last the owners.
  // Of padded tiles w and h are slots (TileSizes).
  uint64_t bits;

  // flags: bit w: consumer w waits for the tile and releases its stage
  // owners: bit w: it computes on the tile
  template <class Sequence>
  VSA_DEVICE static TileLoad of(const Sequence& sequence,
                                int tile,
                                uint32_t flags,
                                uint32_t owners = 0) {
    const TilePlace at = sequence.place(tile);
    const Axes in_tiles = sequence.steps(at, tile);
    return {static_cast<uint64_t>(in_tiles.w) | static_cast<uint64_t>(in_tiles.h) << 16 |
            static_cast<uint64_t>(in_tiles.t) << 32 | uint64_t{at.clip} << kClip |
            static_cast<uint64_t>(at.region) << kRegion | uint64_t{flags} << kFlags |
            uint64_t{owners} << kOwners};
  }

  // Before its place is worked out: a tile's number, and as flags the consumers that selected it.
  VSA_DEVICE static TileLoad wanted(int tile, uint32_t owners) {
    return {static_cast<uint32_t>(tile) | uint64_t{owners} << kFlags};
  }
  VSA_DEVICE int wanted_tile() const { return static_cast<int>(bits); }

  VSA_DEVICE uint32_t flags() const { return static_cast<uint32_t>(bits >> kFlags & 15); }
  VSA_DEVICE uint32_t owners() const { return static_cast<uint32_t>(bits >> kOwners); }
  template <class Sequence>
  VSA_DEVICE TilePlace place(const Sequence& sequence) const {
    const int w = bits & 0xffff, h = bits >> 16 & 0xffff, t = bits >> 32 & 0xffff;
    const Axes& tile = sequence.grid.tile;
    const auto region = static_cast<Region>(bits >> kRegion & 3);
    if (region == Region::Video)
      return {region,
              -1,
              {t * tile.t, h * tile.h, w * sequence.step_tokens()},
              static_cast<unsigned>(bits >> kClip & 7)};
    return {region,
            region == Region::Prefix ? w : sequence.prefix_tiles() + w,
            {0, 0, w * kTileRows},
            kWhole};
  }
  // The tile's number.
  template <class Sequence>
  VSA_DEVICE int tile(const Sequence& sequence) const {
    const int w = bits & 0xffff, h = bits >> 16 & 0xffff, t = bits >> 32 & 0xffff;
    const auto region = static_cast<Region>(bits >> kRegion & 3);
    if (region == Region::Video) return sequence.number({t, h, w});
    return sequence.grid.num_tiles() + (region == Region::Prefix ? w : sequence.prefix_tiles() + w);
  }
};

// One use of a ring stage, and the barrier and phase that say it is full
// (kernels/schedule/rings.h).
struct RingUse {
  static constexpr int kRounds = 8;  // full barriers of a stage, used round-robin

  int stage, barrier, phase;

  template <int Stages>
  VSA_DEVICE static RingUse of(
      int number) {  // of the tile load, counted from the first of the block
    const int stage = Ring<Stages>::stage(number), use = Ring<Stages>::use(number);
    return {stage, stage * kRounds + use % kRounds, use / kRounds};
  }
};

// A step of a consumer. Tile load n uses both rings, one for each of two tensors.
struct alignas(16) ConsumerStep {
  enum Kind : uint32_t {
    kCompute,    // computes on the tile
    kSkip,       // releases the tile unread, so as never to miss more uses than barriers tell apart
    kFlush,      // releases the tile it holds: the next one cannot be loaded before
    kNextChunk,  // continues in the next chunk
    kDone        // the work tile is complete
  };

  uint32_t places;  // 8 bits each, from the lowest: stage and barrier of the first and second ring
  uint32_t phases;  // kind 8, phases 12 each
  uint64_t rows;    // of the tile that are tokens

  VSA_DEVICE static ConsumerStep of(Kind kind, RingUse first, RingUse second, uint64_t rows) {
    return {static_cast<uint32_t>(first.stage | first.barrier << 8 | second.stage << 16 |
                                  second.barrier << 24),
            static_cast<uint32_t>(kind | (first.phase & 0xfff) << 8 |
                                  static_cast<uint32_t>(second.phase) << 20),
            rows};
  }
  VSA_DEVICE static ConsumerStep of(Kind kind) { return {0, kind, 0}; }

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

// A consumer has a step in every window of so many tile loads, so it misses at most this many uses.
constexpr int kStepWindow = 8, kMostSkipped = 2 * (kStepWindow - 1);

// The loads and steps of a chunk, in two buffers. Producers have few registers, so they read here
// again for every load.
template <int Consumers, int Loads>
struct TileSchedule {
  static constexpr int kBuffers = 2;
  // Of a consumer in a chunk. A flush takes the place of loads without a step, except for the first
  // of a chunk; and there is the last step, kNextChunk or kDone.
  static constexpr int kConsumerSteps = Loads + 2;

  struct Chunk {
    WorkTile work;
    int head;   // of the columns
    int loads;  // 0 if no row selected any tile
    uint32_t flags;

    enum Flags : uint32_t { kFirst = 1, kFinished = 2 };  // of its work tile; there is no more work
    VSA_DEVICE bool first() const { return flags & kFirst; }
    VSA_DEVICE bool finished() const { return flags & kFinished; }
  };

  // Of the two tensors whose tiles are loaded together.
  struct alignas(16) Origins {
    HeadOrigin first, second;
  };

  Shared<Origins> origins[kBuffers];
  Shared<TileLoad> loads[kBuffers][Loads];  // flags: consumers with a step
  Shared<ConsumerStep> steps[kBuffers][Consumers][kConsumerSteps];
  Shared<Chunk> chunks[kBuffers];
  Mbarrier full[kBuffers];
  Mbarrier empty[kBuffers];

  // warpgroups: that read a chunk, consumers and perhaps a reducer
  VSA_DEVICE void init(int producers, int warpgroups = Consumers) {
    for (int i = 0; i < kBuffers; ++i) {
      full[i].init(kWarpThreads, "schedule_full", i);
      empty[i].init(producers + warpgroups * kWarpgroupThreads, "schedule_empty", i);
      label(origins[i], "origins", i);
      label(loads[i], "loads", i);
      label(steps[i], "steps", i);
      label(chunks[i], "chunks", i);
    }
  }

  VSA_DEVICE Chunk chunk(int n) const { return chunks[n % kBuffers].get(); }
  VSA_DEVICE TileLoad tile_load(int n, int i) const { return loads[n % kBuffers][i].get(); }

  // ---- a producer, one thread ----

  // Calls load(work) for each work tile. Asleep: whether it sleeps until there is one
  template <bool Asleep = false, class Load>
  VSA_DEVICE void for_each_work_tile(Load load) {
    for_each_chunk<Asleep>([&](int, const Chunk& chunk) {
      if (chunk.first()) load(chunk.work);
    });
  }
  // Calls load(n, i) for each tile load i of each chunk n. Together: by a whole warpgroup
  template <bool Together = false, class Load>
  VSA_DEVICE void for_each_load(Load load) {
    for_each_chunk<false, Together>([&](int n, const Chunk& chunk) {
      for (int i = 0; i < chunk.loads; ++i) load(n, i);
    });
  }

  // Copies a tile of one of the two tensors.
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
  template <bool Asleep = false, bool Together = false, class Each>
  VSA_DEVICE void for_each_chunk(Each each) {
    for (int n = 0;; ++n) {
      if constexpr (Asleep) full[n % kBuffers].wait_asleep(n / kBuffers);
      full[n % kBuffers].wait(n / kBuffers);
      const Chunk of = chunk(n);
      if (of.finished()) break;
      each(n, of);
      if constexpr (Together)
        empty[n % kBuffers].arrive_all();
      else
        empty[n % kBuffers].arrive_one();
    }
  }
};

}  // namespace vsa
