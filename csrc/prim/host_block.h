// SPDX-License-Identifier: Apache-2.0
// Runs one block of a kernel on the emulator. The twin of sm90_block.h.
#pragma once
#include "prim/host.h"

namespace vsa::host {

// The machine of this thread, for as long as a block runs.
struct Running {
  explicit Running(Machine* next) : before(std::exchange(machine, next)) {}
  ~Running() { machine = before; }
  Machine* const before;
};

// Throws Hazard for what the kernel does wrong. Blocks of one kernel may run in different threads
// at a time, if the kernel's blocks may.
template <class Kernel>
void run_block(const typename Kernel::Params& params, int block, int blocks, unsigned seed) {
  using SharedMemory = typename Kernel::SharedMemory;
  static_assert(sizeof(SharedMemory) <= kSharedBytes, "a block has 227 KiB of shared memory");
  static_assert(
      Kernel::kThreads == (Kernel::kConsumers + 1 + has_reducer<Kernel>()) * kWarpgroupThreads,
      "a block is a warpgroup that copies, its consumers and a reducer, if it has one");
  static_assert(
      Kernel::kProducerRegisters + Kernel::kConsumers * Kernel::kConsumerRegisters +
              reducer_registers<Kernel>() <=
          Kernel::kThreads / kWarpgroupThreads * launch_registers(Kernel::kThreads),
      "the roles share what the block was launched with: more would be waited for forever");
  const auto owned = std::make_unique<Machine>(block, blocks, seed);
  const Running running(owned.get());
  auto& smem = *reinterpret_cast<SharedMemory*>(machine->smem);
  Kernel::init_barriers(smem);
  Kernel::prologue(params, smem, 0, 1);
  for (int i = 0; i < Kernel::kProducers; ++i)
    machine->add_agent(Kernel::kProducers == 1 ? "producer" : "producer" + std::to_string(i),
                       [&, i] { Kernel::produce(params, smem, i); });
  if constexpr (requires { Kernel::schedule(params, smem); })
    machine->add_agent("scheduler", [&] { Kernel::schedule(params, smem); });
  for (int w = 0; w < Kernel::kConsumers; ++w)
    machine->add_agent("consumer" + std::to_string(w),
                       [&, w] { Kernel::consume(params, smem, w); });
  if constexpr (has_reducer<Kernel>())
    machine->add_agent("reducer", [&] { Kernel::reduce(params, smem); });
  machine->run();
}

// The same for kernels of which a block is one warpgroup that does everything.
template <class Kernel>
void run_warpgroup_block(const typename Kernel::Params& params,
                         int block,
                         int blocks,
                         unsigned seed) {
  using SharedMemory = typename Kernel::SharedMemory;
  static_assert(sizeof(SharedMemory) <= kSharedBytes, "a block has 227 KiB of shared memory");
  static_assert(Kernel::kThreads == kWarpgroupThreads, "a block is one warpgroup");
  const auto owned = std::make_unique<Machine>(block, blocks, seed);
  const Running running(owned.get());
  auto& smem = *reinterpret_cast<SharedMemory*>(machine->smem);
  Kernel::label_tiles(smem);
  machine->add_agent("warpgroup", [&] { Kernel::run(params, smem); });
  machine->run();
}

}  // namespace vsa::host
