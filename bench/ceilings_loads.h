// SPDX-License-Identifier: Apache-2.0
// Tiles of 4x4x4 tokens from L2 to shared memory, by TMA or cp.async, out of raster order or from
// one piece of memory each, with or without products.
// Here as in ceilings_rates.h loops are counted, and a barrier that never completes ends the kernel
// by a trap after about two seconds.
#pragma once
#include "prim/prim.h"

namespace vsa::ceilings {

constexpr long long kPatience = 4'000'000'000;  // clocks
constexpr int kTokenChannels = 1536;            // all heads of a token, as in a 1.3B model
constexpr int kGridSide = 32;                   // tokens along h and w; t makes the footprint
constexpr int kTilesPerLayer = kGridSide / 4 * kGridSide / 4;

VSA_DEVICE uint32_t hashed(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352d;
  x = (x ^ x >> 15) * 0x846ca68b;
  return x ^ x >> 16;
}
// Two random bf16 between 1/8 and 2 in magnitude: zeros would let the clock rise.
VSA_DEVICE uint32_t random_pair(uint32_t i) { return (hashed(i) & 0x81ff81ff) | 0x3e003e00; }
// The nth tile that a group of blocks draws.
VSA_DEVICE uint32_t drawn(uint32_t seed, uint32_t group, uint32_t n, uint32_t tiles) {
  return __umulhi(hashed(hashed(seed + group) ^ n * 0x9e3779b9), tiles);
}

VSA_DEVICE void wait(Mbarrier& barrier, int use, long long deadline) {
  for (uint32_t done = 0; done == 0;) {
    asm volatile(
        "{.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;}"
        : "=r"(done)
        : "r"(smem_address(&barrier)), "r"(use & 1)
        : "memory");
    if (done == 0 && clock64() > deadline) __trap();
  }
}

static __global__ void fill_random(uint32_t* words, size_t count) {
  const size_t stride = size_t{gridDim.x} * blockDim.x;
  for (size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += stride)
    words[i] = random_pair(static_cast<uint32_t>(i ^ i >> 32));
}

VSA_DEVICE void fill_shared(void* to, int bytes) {
  uint32_t* words = static_cast<uint32_t*>(to);
  for (int i = threadIdx.x; i < bytes / 4; i += blockDim.x) words[i] = random_pair(i);
  fence_async_proxy();
}

// Random, and held in registers: ptxas would otherwise make them anew among the products.
template <int K>
VSA_DEVICE void fill_operand(Operand<K>& a) {
  VSA_UNROLL
  for (int i = 0; i < K / 4; ++i) {
    a.x[i] = random_pair(threadIdx.x * (K / 4) + i);
    asm volatile("" : "+r"(a.x[i]));
  }
}

template <int N>
VSA_DEVICE float total(const Fragment<N>& f) {
  float sum = 0;
  VSA_UNROLL
  for (float x : f.x) sum += x;
  return sum;
}

VSA_DEVICE void zero(auto& fragment) {
  VSA_UNROLL
  for (float& x : fragment.x) x = 0;
}

// What every kernel reports: clocks of each block, and sums that keep results from being dropped.
struct Report {
  long long* clocks;
  float* sink;
};

struct LoadParams {
  TensorMap map;
  const unsigned char* tokens;
  int tiles, slots;  // to draw from; to load, a multiple of four
  uint32_t seed;
  Report report;
};

// How tiles come: as boxes or row by row out of raster order, or from a copy in which every tile is
// one piece of memory.
enum class By { Boxes, Rows, Pieces };

// Warpgroup 0 loads, the others (two, if Users > 0) multiply: each slot is used by one or both of
// them. Slots 4n and 4n + 2 hold what stands for K, the next one V: a stage always meets the same
// users, because the number of stages is a multiple of four.
template <int D, By How, int Users>
struct Loads {
  static constexpr bool Tma = How != By::Rows;
  static constexpr int kTileBytes = kTileRows * D * 2;
  static constexpr int kPanels = D / kPanelChannels;
  static constexpr int kStages = 12 * 128 / D;
  static constexpr int kInFlight = kStages / 3;  // groups of cp.async, 64 KiB
  static constexpr int kMultipliers = Users > 0 ? 2 : 0;
  static constexpr int kThreads = (1 + kMultipliers) * kWarpgroupThreads;
  static_assert(kStages % 4 == 0);

  struct Shared {
    unsigned char q[2][kTileBytes];
    unsigned char ring[kStages][kTileBytes];
    Mbarrier full[kStages], empty[kStages];
  };

  const LoadParams& params;
  Shared& shared;
  long long deadline;

  VSA_DEVICE void run() {
    fill_shared(shared.q, sizeof shared.q);
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) {
        shared.full[i].init(Tma ? 1 : kWarpgroupThreads, "full", i);
        shared.empty[i].init(Users * kWarpgroupThreads + (Users == 0), "empty", i);
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    const int role = __shfl_sync(~0u, threadIdx.x, 0) / kWarpgroupThreads;
    if (role > 0) {
      if constexpr (Users > 0) multiply(role - 1);
    } else if constexpr (Tma) {
      if (elect_one()) load_boxes();
    } else {
      load_rows();
    }
  }

  // Slot n's stage may be filled again: its users let go of it, or nobody uses what arrives.
  VSA_DEVICE void wait_free(int n) {
    if (n < kStages) return;
    Mbarrier& barrier = Users > 0 ? shared.empty[n % kStages] : shared.full[n % kStages];
    wait(barrier, n / kStages - 1, deadline);
  }

  VSA_DEVICE BoxCoordinates place(int n) const {
    const int tile = drawn(params.seed, blockIdx.x, n, params.tiles);
    if constexpr (How == By::Pieces) return {0, 0, 0, tile * 4, 0};
    return {0, tile % 8 * 4, tile / 8 % 8 * 4, tile / kTilesPerLayer * 4, 0};
  }

  VSA_DEVICE void load_boxes() {
    for (int n = 0; n < params.slots; ++n) {
      const int stage = n % kStages;
      wait_free(n);
      shared.full[stage].arrive_expect_tx(kTileBytes);
      BoxCoordinates at = place(n);
      for (int panel = 0; panel < kPanels; ++panel, at.channel += kPanelChannels)
        tma_load_panel(shared.ring[stage] + panel * kPanelBytes, params.map, at,
                       shared.full[stage]);
    }
    const int last = params.slots - 1;  // a stage is filled in order, not the stages among them
    for (int n = max(0, params.slots - kStages); n <= last; ++n)
      wait(shared.full[n % kStages], n / kStages, deadline);
  }

  VSA_DEVICE void load_rows() {
    constexpr int kPasses = kTileRows * 8 / kWarpgroupThreads;  // 16 bytes of 8 x 16 rows at once
    constexpr int64_t kTokenBytes = kTokenChannels * 2;
    const int chunk = threadIdx.x % 8, first_row = threadIdx.x / 8;
    for (int n = 0; n < params.slots; ++n) {
      wait_free(n);
      const BoxCoordinates at = place(n);
      const int64_t corner = (int64_t{at.t} * kGridSide + at.h) * kGridSide + at.w;
      const unsigned char* from = params.tokens + corner * kTokenBytes + chunk * kChunkBytes;
      const uint32_t to = smem_address(shared.ring[n % kStages]);
      VSA_UNROLL
      for (int pass = 0; pass < kPasses; ++pass) {
        const int row = first_row + pass * (kTileRows / kPasses);
        const int64_t token = (row / 16 * kGridSide + row / 4 % 4) * kGridSide + row % 4;
        VSA_UNROLL
        for (int panel = 0; panel < kPanels; ++panel)
          asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(swizzle128(
                           to + panel * kPanelBytes + row * kRowBytes + chunk * kChunkBytes)),
                       "l"(from + token * kTokenBytes + panel * kRowBytes)
                       : "memory");
      }
      asm volatile("cp.async.commit_group;" ::: "memory");
      asm volatile("cp.async.wait_group %0;" ::"n"(kInFlight - 1) : "memory");
      if (n >= kInFlight - 1) publish(n - (kInFlight - 1));
    }
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    for (int n = max(0, params.slots - (kInFlight - 1)); n < params.slots; ++n) publish(n);
  }
  VSA_DEVICE void publish(int n) {
    fence_async_proxy();
    shared.full[n % kStages].arrive_all();
  }

  // S += Q K^T and O += P V, where P never changes: the products of a forward without its softmax.
  VSA_DEVICE void multiply(int own) {
    Fragment<kTileRows> s;
    Fragment<D> o;
    Operand<kTileRows> p;
    zero(s);
    zero(o);
    fill_operand(p);
    const uint32_t q = smem_address(shared.q[own]);
    constexpr int kStep = Users == 1 ? 4 : 2;
    const int first = Users == 1 ? 2 * own : 0;
#pragma unroll 1
    for (int n = first; n < params.slots; n += kStep) {
      const int k = n % kStages, v = (n + 1) % kStages;
      wait(shared.full[k], n / kStages, deadline);
      const uint32_t keys = smem_address(shared.ring[k]), values = smem_address(shared.ring[v]);
      wgmma_fence();
      VSA_UNROLL
      for (int i = 0; i < D / kReduction; ++i)
        wgmma<Bf16, false, false>(s, channels_descriptor(q, i), channels_descriptor(keys, i), true);
      wgmma_commit();
      wgmma_wait<1>(o);
      if (n != first) shared.empty[(n - kStep + 1) % kStages].arrive_all();
      wait(shared.full[v], (n + 1) / kStages, deadline);
      wgmma_fence();
      VSA_UNROLL
      for (int i = 0; i < kTileRows / kReduction; ++i)
        wgmma<Bf16, true>(o, p, i, rows_descriptor(values, i), true);
      wgmma_commit();
      wgmma_wait<1>(s);
      shared.empty[k].arrive_all();
    }
    wgmma_wait<0>(s, o);
    params.report.sink[blockIdx.x * kThreads + threadIdx.x] = total(s) + total(o);
  }
};

template <int D, By How, int Users>
__global__ void __launch_bounds__(Loads<D, How, Users>::kThreads, 1)
    loads(const __grid_constant__ LoadParams params) {
  using Kernel = Loads<D, How, Users>;
  extern __shared__ __align__(1024) unsigned char memory[];
  const long long start = clock64();
  auto& shared = *reinterpret_cast<typename Kernel::Shared*>(memory);
  Kernel{params, shared, start + kPatience}.run();
  __syncthreads();
  if (threadIdx.x == 0) params.report.clocks[blockIdx.x] = clock64() - start;
}

}  // namespace vsa::ceilings
