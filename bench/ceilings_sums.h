// SPDX-License-Identifier: Apache-2.0
// How gradients of queries leave a block of a backward in one pass: halves of 64 channels, each
// from the registers of a warpgroup to where they are added up in global memory.
//
//     a warpgroup                          a thread of the first warpgroup
//     wait for staged_empty
//     registers -> shared memory
//     arrive at staged_full                wait for staged_full
//                                          bulk reduction; when it has read, staged_empty
//
// A half lies in the order of the registers: [16, 128 threads, 4 floats], or as many pairs of bf16.
#pragma once
#include "ceilings_stages.h"

namespace vsa::ceilings {

enum class Sum {
  Nothing,   // dQ stays on chip: what its product costs by itself
  Floats,    // bulk reductions of fp32
  Pairs,     // of bf16, half as many bytes: a sum has to be over few of them to be of use
  Registers  // red.global.add.v4.f32, no staging
};

constexpr int kHalf = kTileRows * 64;  // numbers
template <Sum To>
constexpr int kHalfBytes = kHalf * (To == Sum::Pairs ? 2 : 4);

// Where the halves of dQ of query tile n go; cluster: of the blocks that add to one tile together.
template <int D, Sum To, int Cluster>
VSA_DEVICE unsigned char* place_of_sum(const BackwardParams& params, int n, int half) {
  const int group = blockIdx.x / Cluster;
  const uint32_t tile = params.sum_tiles == 0 ? group * params.steps + n
                                              : drawn(params.seed + 2, group, n, params.sum_tiles);
  const size_t index = size_t{tile} * (D / 64) + half;
  return static_cast<unsigned char*>(params.sums) + index * kHalfBytes<To>;
}

// Cluster: blocks that add to one tile together; each has one buffer for what it adds, one block
// has two.
template <Sum To, int Cluster>
struct Staging {
  static constexpr bool kStaged = To == Sum::Floats || To == Sum::Pairs;
  static constexpr int kBuffers = Cluster == 1 ? 2 : 1;

  struct Memory {
    alignas(128) unsigned char bytes[kBuffers][kStaged ? kHalfBytes<To> : 128];
  };
  struct Barriers {
    Mbarrier full[kBuffers], empty[kBuffers];

    VSA_DEVICE void init() {
      for (int i = 0; i < kBuffers; ++i) {
        full[i].init(kWarpgroupThreads, "staged_full", i);
        empty[i].init(1, "staged_empty", i);
      }
    }
  };

  // A warpgroup: half `half` of dQ of query tile n, the use-th that goes through the buffer.
  template <int D>
  VSA_DEVICE static void put(const BackwardParams& params,
                             Memory& memory,
                             Barriers& barriers,
                             const Fragment<64>& half,
                             int n,
                             int which,
                             int buffer,
                             int use) {
    const int t = no_hoist(threadIdx.x) % kWarpgroupThreads;
    if constexpr (To == Sum::Nothing) {
      if (params.images == nullptr) return;  // as when it is timed; ptxas has to keep the product
      float* to = static_cast<float*>(params.sums) + 4 * t;
      VSA_UNROLL
      for (int i = 0; i < 32; ++i) to[i] = half.x[i];
    } else if constexpr (To == Sum::Registers) {
      float* to = reinterpret_cast<float*>(place_of_sum<D, To, Cluster>(params, n, which)) + 4 * t;
      VSA_UNROLL
      for (int i = 0; i < 32; i += 4)
        asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(
                         to + i * kWarpgroupThreads),
                     "f"(half.x[i]), "f"(half.x[i + 1]), "f"(half.x[i + 2]), "f"(half.x[i + 3])
                     : "memory");
    } else {
      barriers.empty[buffer].wait(use - 1);
      const uint32_t to = smem_address(memory.bytes[buffer]) + 16 * t;
      if constexpr (To == Sum::Floats) {
        VSA_UNROLL
        for (int i = 0; i < 32; i += 4)
          store(to + i * 4 * kWarpgroupThreads, half.x[i], half.x[i + 1], half.x[i + 2],
                half.x[i + 3]);
      } else {
        Operand<64> pairs;
        round_to<Bf16>(pairs, half);
        VSA_UNROLL
        for (int i = 0; i < 16; i += 4)
          store(to + i * 4 * kWarpgroupThreads, pairs.x[i], pairs.x[i + 1], pairs.x[i + 2],
                pairs.x[i + 3]);
      }
      fence_async_proxy();
      barriers.full[buffer].arrive_all();
    }
  }

  // One thread: adds what comes through a buffer. every: of how many query tiles one goes through
  // it, from `first` on
  template <int D>
  VSA_DEVICE static void add(const BackwardParams& params,
                             Memory& memory,
                             Barriers& barriers,
                             int buffer,
                             int first,
                             int every,
                             int which) {
    if constexpr (kStaged) {
      int use = 0;
      for (int n = first; n < params.steps; n += every, ++use) {
        barriers.full[buffer].wait(use);
        unsigned char* to = place_of_sum<D, To, Cluster>(params, n, which);
        if constexpr (To == Sum::Floats)
          bulk_reduce_add(reinterpret_cast<float*>(to),
                          reinterpret_cast<const float*>(memory.bytes[buffer]), kHalfBytes<To>);
        else
          asm volatile(
              "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.noftz.bf16 [%0], [%1], %2;" ::
                  "l"(to),
              "r"(smem_address(memory.bytes[buffer])), "r"(kHalfBytes<To>)
              : "memory");
        bulk_commit();
        bulk_wait_read<0>();
        barriers.empty[buffer].arrive_one();
      }
      bulk_wait<0>();
    }
  }

 private:
  VSA_DEVICE static void store(uint32_t to, float a, float b, float c, float d) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(a), "f"(b), "f"(c),
                 "f"(d)
                 : "memory");
  }
  VSA_DEVICE static void store(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c),
                 "r"(d)
                 : "memory");
  }
};

// Two blocks that share the sums of a query tile: half of what one has goes to the other, which
// adds its own. One half tile is on its way at a time.
struct Exchange {
  static constexpr int kBytes = kHalf * 4;

  struct Barriers {
    Mbarrier full;  // in the block that receives: all has come
    Mbarrier room;  // in the block that sends: the last has been taken

    VSA_DEVICE void init() {
      full.init(1, "received", 0);
      room.init(kWarpgroupThreads / kWarpThreads, "room", 0);
    }
  };

  VSA_DEVICE static int rank() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
  }
  // Not aligned: one lane of a warp that copies comes later than the others.
  VSA_DEVICE static void meet() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
  }

  // A warpgroup: the use-th half.
  VSA_DEVICE static void send(float* received,
                              Barriers& barriers,
                              const Fragment<64>& half,
                              int use) {
    wait_cluster(barriers.room, use - 1);
    const uint32_t to = of_other(smem_address(received)) + 16 * (threadIdx.x % kWarpgroupThreads);
    const uint32_t barrier = of_other(smem_address(&barriers.full));
    VSA_UNROLL
    for (int i = 0; i < 32; i += 4)
      asm volatile(
          "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, "
          "%4}, [%5];" ::"r"(to + i * 4 * kWarpgroupThreads),
          "f"(half.x[i]), "f"(half.x[i + 1]), "f"(half.x[i + 2]), "f"(half.x[i + 3]), "r"(barrier)
          : "memory");
  }

  // A warpgroup: adds the use-th half to its own.
  VSA_DEVICE static void receive(const float* received,
                                 Barriers& barriers,
                                 Fragment<64>& half,
                                 int use) {
    const int t = no_hoist(threadIdx.x) % kWarpgroupThreads;
    if (t == 0) barriers.full.arrive_expect_tx(kBytes);
    wait_cluster(barriers.full, use);
    VSA_UNROLL
    for (int i = 0; i < 32; i += 4) {
      const float4 came =
          *reinterpret_cast<const float4*>(received + i * kWarpgroupThreads + 4 * t);
      half.x[i] += came.x;
      half.x[i + 1] += came.y;
      half.x[i + 2] += came.z;
      half.x[i + 3] += came.w;
    }
    __syncwarp();
    if (t % kWarpThreads == 0)
      asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                       of_other(smem_address(&barriers.room)))
                   : "memory");
  }

 private:
  VSA_DEVICE static uint32_t of_other(uint32_t address) {
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank() ^ 1));
    return there;
  }
  VSA_DEVICE static void wait_cluster(Mbarrier& barrier, int use) {
    asm volatile(
        "{.reg .pred done;\nAGAIN_%=:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra AGAIN_%=;}" ::"r"(smem_address(&barrier)),
        "r"(use & 1)
        : "memory");
  }
};

}  // namespace vsa::ceilings
