// SPDX-License-Identifier: Apache-2.0
// What a block does on the GPU: a prologue by all threads, then the warpgroup that copies and the
// consumers' part ways. The former has a warp for each producer and one for the scheduler, in
// kernels that have one. Some kernels have a last warpgroup, the reducer, which adds up what
// consumers make. The twin of host_block.h.
#pragma once
#include "prim/sm90.h"

namespace vsa {

// To be called by a __global__ function with `const __grid_constant__ Params` and
// __launch_bounds__(Kernel::kThreads, 1), launched with sizeof(Kernel::SharedMemory) bytes.
template <class Kernel>
VSA_DEVICE void run_kernel(const typename Kernel::Params& params) {
  using SharedMemory = typename Kernel::SharedMemory;
  static_assert(sizeof(SharedMemory) <= kSharedBytes, "a block has 227 KiB of shared memory");
  static_assert(
      Kernel::kThreads == (Kernel::kConsumers + 1 + has_reducer<Kernel>()) * kWarpgroupThreads,
      "a block is a warpgroup that copies, its consumers and a reducer, if it has one");
  static_assert(Kernel::kProducerRegisters % 8 == 0 && Kernel::kConsumerRegisters % 8 == 0 &&
                    Kernel::kProducerRegisters >= 24 && Kernel::kConsumerRegisters <= 240,
                "registers are handed over in eights, from 24 to 240");
  static_assert(
      Kernel::kProducerRegisters + Kernel::kConsumers * Kernel::kConsumerRegisters +
              reducer_registers<Kernel>() <=
          Kernel::kThreads / kWarpgroupThreads * launch_registers(Kernel::kThreads),
      "the roles share what the block was launched with: more would be waited for forever");
  extern __shared__ __align__(1024) unsigned char bytes[];
  auto& smem = *reinterpret_cast<SharedMemory*>(bytes);
  if (threadIdx.x == 0) {
    Kernel::init_barriers(smem);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  Kernel::prologue(params, smem, static_cast<int>(threadIdx.x), Kernel::kThreads);
  __syncthreads();
  // Through a shuffle, so that the compiler knows it to be the same for the whole warp.
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpThreads, 0);
  const int warpgroup = warp / (kWarpgroupThreads / kWarpThreads);
  if (warpgroup == 0) {
    give_registers<Kernel::kProducerRegisters>();
    if (warp < Kernel::kProducers) Kernel::produce(params, smem, warp);
    if constexpr (requires { Kernel::schedule(params, smem); })
      if (warp == Kernel::kProducers) Kernel::schedule(params, smem);
  } else if (has_reducer<Kernel>() && warpgroup > Kernel::kConsumers) {
    if constexpr (has_reducer<Kernel>()) {
      give_registers<Kernel::kReducerRegisters>();
      Kernel::reduce(params, smem);
    }
  } else {
    take_registers<Kernel::kConsumerRegisters>();
    Kernel::consume(params, smem, warpgroup - 1);
  }
}

// The same for kernels of which a block is one warpgroup that does everything, launched with
// __launch_bounds__(Kernel::kThreads) and a block for every piece of work.
template <class Kernel>
VSA_DEVICE void run_warpgroup(const typename Kernel::Params& params) {
  static_assert(Kernel::kThreads == kWarpgroupThreads, "a block is one warpgroup");
  extern __shared__ __align__(1024) unsigned char bytes[];
  Kernel::run(params, *reinterpret_cast<typename Kernel::SharedMemory*>(bytes));
}

}  // namespace vsa
