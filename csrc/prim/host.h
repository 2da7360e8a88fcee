// SPDX-License-Identifier: Apache-2.0
// The primitives of prim.h on a CPU. They do what the hardware does, element by element, and as
// late, early or out of order as the hardware may; what must not happen is thrown as a Hazard with
// its name:
//
//   RACE                    a touch of shared memory that is not ordered after a conflicting one
//   MISSING PROXY FENCE     ordinary stores that TMA or wgmma may not see
//   MISSING NAMED BARRIER   one thread or warp goes ahead when others of its warpgroup may not have
//                           come that far: loaded or stored, learnt that a TMA store has read,
//                           finished their part of a product
//   NEVER WRITTEN           shared memory that is read before anything was stored there
//   WRONG SWIZZLE           bytes left in one layout and read in another
//   WRONG DESCRIPTOR        a wgmma operand that is no part of a tile
//   WRONG EXPECT_TX         a barrier that expects more or fewer bytes than its copies bring
//   TOO MANY ARRIVALS       on an mbarrier, within one phase
//   PHASE ALIAS             a wait that the hardware, which sees only parity, would get wrong
//   MBARRIER NOT INITIALISED
//   NAMED BARRIER           warpgroups that disagree about who meets
//   FRAGMENT IN FLIGHT      registers that a product still works on
//   MISSING WGMMA FENCE     registers touched, and no fence before the next product
//   WGMMA STILL IN FLIGHT   a fragment or a kernel that is not waited for
//   STORES STILL IN FLIGHT, STORES NEVER COMMITTED  at the end of an agent
//   LOADS STILL IN FLIGHT   at the end of the block: nobody has waited for them
//   NOT ELECTED             what one thread should do, done by all 128
//   DIVERGED                what the whole warpgroup should do, done by a warp in if_any_row
//   MISALIGNED LOAD         from global memory, by load_global
//   WRONG NUMBER            that a caller must not pass, found by stop_unless
//   TILE COUNTER NOT ZERO   at the start of a launch, found by take_tile
//   SHARED MEMORY, OUT OF BOUNDS, NOT SHARED MEMORY, BAD TENSOR MAP, BAD COPY
//   DEADLOCK                and who waits for what
//
// It cannot see: drift between the warps of one warpgroup, but for MISSING NAMED BARRIER, which
// takes ordinary loads and stores to be everyone's unless elect_one came last; primitives of the
// whole warpgroup under elect_one; order in global memory and between blocks; registers, bank
// conflicts, speed; how ex2 and lg2 round.
#pragma once

#define VSA_DEVICE inline
#define VSA_UNROLL

#include "prim/host_wgmma8.h"

namespace vsa {

template <class T>
T load_global(const T* pointer) {
  if (reinterpret_cast<uintptr_t>(pointer) % sizeof(T) != 0)
    throw host::Hazard("MISALIGNED LOAD: " + std::to_string(sizeof(T)) + " bytes at once");
  return *pointer;
}

template <class T>
T load_global(const T* pointer, bool wanted) {
  return wanted ? load_global(pointer) : T{};
}

// Blocks run one after the other, but take work tiles as if they took turns.
inline int take_tile(int* counter) {
  host::one_thread("take_tile");
  host::Machine& block = *host::machine;
  if (block.block == 0 && block.tiles_taken == 0 && *counter != 0)
    throw host::Hazard("TILE COUNTER NOT ZERO: the counter is " + std::to_string(*counter) +
                       ", not 0");
  ++*counter;
  return block.block + block.blocks * block.tiles_taken++;
}

inline int block_index() { return host::machine->block; }
inline int block_count() { return host::machine->blocks; }
inline bool elect_one() { return host::machine->current->elected = true; }
inline bool elect_lane() { return host::machine->current->elected = true; }
template <int Registers>
void take_registers() {}
template <int Registers>
void give_registers() {}

}  // namespace vsa
