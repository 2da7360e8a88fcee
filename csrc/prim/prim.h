// SPDX-License-Identifier: Apache-2.0
// The machine that kernels are written for, at the grain of a warpgroup: 128 threads that issue
// matrix products together. Kernels and tiles name only what is listed here and the facts of
// operand.h and operand8.h. Two machines have it: sm90 (PTX) and host, a functional emulator that
// runs every agent as asynchronously as the hardware may, and names what goes wrong (see host.h).
//
// Numbers
//   pack<Element>(lo, hi)           two floats rounded to 16 bits each, lo in the low half
//   widen_low, widen_high<Element>(pair)
//                                   the two floats of a pair
//   pack8<Element>(a, b, c, d)      four floats as S8 or E4m3, a in the lowest byte: the nearest
//                                   integers, from -127 to 127; the nearest e4m3, 448 for all that
//                                   is larger, infinity too, and NaN for NaN
//   widen_e4m3(x, fours)            the four floats of such a word of E4m3
//   biased_float(x)                 the float x + kNearestInteger of an integer below 2^22
//   line_codes(lo, hi)              two floats as multiples of kCodeUnit, the nearest integers that
//                                   are not negative, each the low byte of 16 bits where it fits,
//                                   0xff for NaN: e4m3 codes of powers of two whose mantissa is
//                                   taken to be linear
//   low_bytes(ab, cd)               the even bytes of both: four codes
//   line_codes(x, slope, offset)    the same of x slope + offset, pairs of halves, in units of 1
//   max_halves(a, b)                the larger ones of two pairs of halves
//   fma_halves(a, b, c)             a b + c of pairs of halves
//   exp2_approx, log2_approx, max2, fma
//   max3(a, b, c)                   of ints
//   load_global(pointer)            a value that no one writes while the kernel runs
//   load_global(pointer, wanted)    the same, or zeros, of a float or a pair of them
//   take_tile(counter)              0, 1, 2, ... to all blocks of a launch, in any order
//
// Who am I
//   block_index(), block_count()    of a grid of persistent blocks
//   elect_one()                     true in one thread of the warpgroup: ask where it matters
//   elect_lane()                    true in one lane of a warp that is an agent of its own
//   take_registers<N>()             more registers per thread for a warpgroup that computes ...
//   give_registers<N>()             ... from one that only copies
//
// Registers: a warpgroup holds these together, each lane its own part
//   Fragment<N>                     fp32 accumulator, 64 x N
//   Fragment<N, int>                of 32-bit integers; Fragment<N, Fp16> of halves, in pairs
//   Operand<K>                      16-bit A operand, 64 x K, in pairs
//   Operand8<K>                     8-bit A operand, 64 x K, in fours
//   RowValues                       one fp32 per row; the four threads of a quad hold copies
//   VSA_EACH_LANE(t) {..}           what every thread t = 0..127 of the warpgroup does
//   lane(f, t)                      thread t's part of f: N / 2 numbers, N / 4 pairs of halves,
//                                   K / 4 pairs, K / 8 fours, or 2 floats
//   quad_reduce(values, op)         folds the four copies of each row into one value
//   neighbour_reduce<Rows>(f, op)   folds each register of lanes whose rows follow each other, Rows
//                                   of them: 1, 2 or 4
//   no_hoist(x)                     x; what is made of it is made anew in each round of a loop,
//                                   where keeping it would take registers that there are not
//   if_any_row(values, test, then)  then() is run by each WARP that has a row with test(value).
//                                   Inside, VSA_EACH_LANE and all that is made of it mean that
//                                   warp's lanes. then() may change registers and nothing else
//   WarpFlag                        one bit of each warp
//   any_row(a, b, c, test)          a flag: the warps that have a row with test(a, b, c)
//   if_warp(flag, then)             then() by the warps whose bit is set, as in if_any_row
//
// Shared memory through ordinary loads and stores: the generic proxy
//   smem_address(p)                 its address in shared memory, bytes
//   smem_words(address)             the 32-bit words there
//   note_write(p, bytes, layout)    what the next stores will touch, and how rows lie there then
//   note_read(p, bytes, layout)     what the next loads will touch; both are free on the GPU
//   label(object, name, index)      what reports call an object; operands of wgmma must have one
//   store_panel(address, a)         all pairs of an Operand<64> into a panel, by a warpgroup
//   fence_async_proxy()             own stores so far become visible to TMA and wgmma
//
// Barriers
//   Mbarrier::init(arrivals, name, index)
//   Mbarrier::arrive_all()          by all threads of a warpgroup: nobody is ever lapped
//   Mbarrier::arrive_warp()         by all lanes of a warp that is an agent of its own
//   Mbarrier::arrive_one(times)     by one thread, as if by so many
//   Mbarrier::arrive_expect_tx(n)   by one thread; the phase waits for n bytes of copies as well
//   Mbarrier::wait(use)             until phase `use` (0, 1, ...) has completed; -1 always has
//   Mbarrier::wait_asleep(use)      the same, for who has time to wake up
//   Mbarrier::is_over(use)          whether it has; true means as much as having waited
//   Mbarrier::is_over(use, wanted)  the same, or false
//   named_sync(id, threads)         whole warpgroups meet; id 1..15
//
// Copies by the TMA engine, called by one thread
//   TensorMap                       five axes of 16-bit elements, and a box; prefetch_map(map)
//   tma_load_panel(panel, map, at, barrier, hint)
//                                   box -> panel; counts the whole box, zeros out of bounds too
//                                   (a box that begins out of bounds is slow: rows before the
//                                   tensor are read from its first address, by all)
//   tma_store_panel(map, at, panel) panel -> box, clipped; a box that begins at a negative
//                                   coordinate is an illegal instruction
//   bulk_load(to, from, bytes, barrier, layout)
//                                   contiguous, in granules of 16 bytes; layout: of the rows there
//   bulk_reduce_add(to, from, bytes)
//                                   adds floats to global memory
//   bulk_commit()                   closes a group of stores and reductions
//   bulk_wait_read<N>()             all groups but the last N have read shared memory
//   bulk_wait<N>()                  all groups but the last N have written global memory
//
// Matrix products, by a warpgroup, asynchronous, each a sum over 16 elements; sums of e4m3 are cut
// off at 13 bits below their largest term (operand8.h)
//   wgmma_fence()                   before the first, and after touching registers of one
//   wgmma<Element, TransA, TransB>(d, a, b, accumulate)
//                                   d (+)= a b, both by descriptor
//   wgmma<Element, TransB>(d, a, k16, b, accumulate)
//                                   a: columns [16 k16, 16 k16 + 16) of an Operand
//   wgmma8<Element>(d, a, b, accumulate)
//   wgmma8<Element>(d, a, k32, b, accumulate)
//                                   the same of S8 or E4m3, each a sum over 32 elements; a: of an
//                                   Operand8. Products that there are: sm90_wgmma8.h
//   wgmma_commit()                  closes a group of products
//   wgmma_wait<N>(finished...)      all groups but the last N are done, these fragments with them
//
// VSA_DEVICE goes before every function over these, VSA_UNROLL before a loop over registers.
#pragma once

#if defined(__CUDACC__)
#include "prim/sm90.h"
#else
#include "prim/host.h"
#endif
