// SPDX-License-Identifier: Apache-2.0
// What the loops of a backward share, some of it with those of a forward: what they are told, tiles
// that come or are always there.
#pragma once
#include "ceilings_loads.h"
#include "tile/tile.h"

namespace vsa::ceilings {

struct BackwardParams {
  TensorMap map;
  int tiles;  // to draw loads from
  int steps;  // tiles that a consumer meets
  int loads;  // 1: tiles come from L2 and are waited for; 0: all are there from the first
  float scale;
  void* sums;     // where gradients of queries are added up, tiles of one after the other
  int sum_tiles;  // to draw from; 0: query tile n of block (or cluster) b is tile b * steps + n
  uint32_t seed;
  unsigned char* images;  // what shared memory holds at first, a block's after the other; or null
  float* results;         // what the consumers of each block hold at last [64, D]; or null
  Report report;
};

// A stage of a ring, and for which time it is used: -1 stands for always, its tile is there. In one
// register.
class At {
 public:
  VSA_DEVICE At(int stage, int use) : code_(use << 4 | stage) {}
  VSA_DEVICE int stage() const { return code_ & 15; }
  VSA_DEVICE int use() const { return code_ >> 4; }

 private:
  int code_;
};
VSA_DEVICE At first_stage(int loads) { return {0, loads - 1}; }
template <int Stages>
VSA_DEVICE At following(At at, int loads) {
  const bool wraps = at.stage() == Stages - 1;
  return {wraps ? 0 : at.stage() + 1, at.use() + (wraps ? loads : 0)};
}

template <int N>
VSA_DEVICE void pin(Fragment<N>& f) {
  VSA_UNROLL
  for (int i = 0; i < N / 2; ++i) asm volatile("" : "+f"(f.x[i])::"memory");
}
// As wgmma_wait, by index: nvcc leaves loops over the elements of a large object's members rolled,
// and the object in local memory.
template <int Pending, class... Fragments>
VSA_DEVICE void wait_products(Fragments&... finished) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
  (pin(finished), ...);
}

// As write_tile, by four instructions: a lane has the address of a row of one of four 8x8 matrices.
VSA_DEVICE void store_matrices(Tile<64>& tile, const Operand<64>& a) {
  const int t = no_hoist(threadIdx.x) % kWarpgroupThreads, row = t / 32 * 16 + t % 16;
  const uint32_t at = tile.address() + row * kRowBytes + (t / 16 % 2 ^ row % 8) * kChunkBytes;
  VSA_UNROLL
  for (int i = 0; i < 4; ++i)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     at ^ i * 2 * kChunkBytes),
                 "r"(a.x[4 * i]), "r"(a.x[4 * i + 1]), "r"(a.x[4 * i + 2]), "r"(a.x[4 * i + 3])
                 : "memory");
}

// Barriers of a ring of stages; where nothing is loaded nobody waits for `empty`.
template <int Stages>
struct StageRing {
  Mbarrier full[Stages], empty[Stages];

  VSA_DEVICE void init(int consumers) {
    for (int i = 0; i < Stages; ++i) {
      full[i].init(1, "full", i);
      empty[i].init(consumers * kWarpgroupThreads, "empty", i);
    }
  }
  VSA_DEVICE void wait(At at) { full[at.stage()].wait(at.use()); }
  VSA_DEVICE void release(At at) { empty[at.stage()].arrive_all(); }

  // One thread: a random tile into the stage, once it is free.
  template <int D>
  VSA_DEVICE void load(Tile<D>& to, At at, int n, uint32_t salt, const BackwardParams& params) {
    empty[at.stage()].wait(at.use() - 1);
    const int tile = drawn(params.seed + salt, blockIdx.x, n, params.tiles);
    full[at.stage()].arrive_expect_tx(sizeof to);
    load_tile(to, params.map, {0, tile % 8 * 4, tile / 8 % 8 * 4, tile / kTilesPerLayer * 4, 0},
              full[at.stage()]);
  }
};

// Two tensors whose tiles come together and go apart.
template <int D, int Stages>
VSA_DEVICE void load_both(const BackwardParams& params,
                          Tile<D> (&first)[Stages],
                          StageRing<Stages>& first_ring,
                          Tile<D> (&second)[Stages],
                          StageRing<Stages>& second_ring) {
  At at = first_stage(1);
  for (int n = 0; params.loads && n < params.steps; ++n) {
    first_ring.load(first[at.stage()], at, n, 0, params);
    second_ring.load(second[at.stage()], at, n, 1, params);
    at = following<Stages>(at, 1);
  }
}

// Fills what lies before the barriers with random pairs, another block with others, and keeps an
// image of it in `images` where one is wanted.
VSA_DEVICE void fill_image(unsigned char* memory, int bytes, unsigned char* images) {
  uint32_t* words = reinterpret_cast<uint32_t*>(memory);
  uint32_t* image = reinterpret_cast<uint32_t*>(images) + size_t{blockIdx.x} * (bytes / 4);
  for (int i = threadIdx.x; i < bytes / 4; i += blockDim.x) {
    words[i] = random_pair(i + blockIdx.x * (bytes / 4));
    if (images != nullptr) image[i] = words[i];
  }
  fence_async_proxy();
}

// The `which`th of a block's results; otherwise their sum, so that no product is dropped.
template <int D>
VSA_DEVICE void keep(const BackwardParams& params, const Fragment<D>& f, int which, int of_block) {
  float* to = params.results + (size_t{blockIdx.x} * of_block + which) * kTileRows * D;
  if (params.results != nullptr) {
    VSA_UNROLL
    for (int i = 0; i < D / 2; ++i) {
      const int t = threadIdx.x % kWarpgroupThreads;
      to[accumulator_row(t, i) * D + accumulator_column(t, i)] = f.x[i];
    }
  }
  float sum = 0;
  VSA_UNROLL
  for (int i = 0; i < D / 2; ++i) sum += f.x[i];
  params.report.sink[blockIdx.x * blockDim.x + threadIdx.x] += sum;
}

VSA_DEVICE void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

template <class Loop>
__global__ void __launch_bounds__(Loop::kThreads, 1)
    backward_loop(const __grid_constant__ BackwardParams params) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<typename Loop::Shared*>(memory);
  fill_image(memory, offsetof(typename Loop::Shared, barriers), params.images);
  params.report.sink[blockIdx.x * blockDim.x + threadIdx.x] = 0;
  auto* clocks = reinterpret_cast<unsigned long long*>(params.report.clocks) + blockIdx.x;
  if (threadIdx.x == 0) {
    *clocks = 0;
    shared.barriers.init();
    publish_barriers();
  }
  __syncthreads();
  Loop::meet();
  const int role = __shfl_sync(~0u, threadIdx.x, 0) / kWarpgroupThreads;
  const long long start = clock64();
  Loop::run(params, shared, role);
  // The consumer that ends last: tensor cores do not serve all alike.
  if (role > 0 && threadIdx.x % kWarpgroupThreads == 0)
    atomicMax(clocks, static_cast<unsigned long long>(clock64() - start));
  Loop::meet();
}

}  // namespace vsa::ceilings
