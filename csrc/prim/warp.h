// SPDX-License-Identifier: Apache-2.0
// What kernels without matrix products are written for: warps of 32 lanes, and plain loads. On the
// GPU a lane is a thread; on a CPU one thread takes all lanes in turn, statement by statement.
//
// Numbers
//   float_bits(x), float_of(bits)   the same 32 bits as an int and as a float
//   reciprocal_approx(x)            1 / x, not always rounded as it should be
//   load_floats<Element, N>(p, i, wanted)
//                                   elements i to i + N - 1 of an array as fp32, zeros if they are
//                                   not wanted, though they are read. N elements are 16 aligned
//                                   bytes, or N is 1; of Bf16 and Fp16 also 8 or 4 aligned bytes.
//                                   Element: Bf16, Fp16 or float
//   max_pairs, min_pairs<Element>(a, b)
//                                   the larger or smaller ones of two pairs; NaN if either is
//   nearest_integer(x)              as 64 bits; ties to even
//   atomic_max(p, x)                of ints in global memory
//   atomic_add(p, x)                of an int or int64_t in global memory
//   stop_unless(test)               the GPU stops with an error that PyTorch reports where a number
//                                   is none that a caller may pass; on a CPU a Hazard
//   no_hoist(pointer)               the pointer, which nvcc then does not compute again at each use
//
// Lanes
//   PerLane<T>                      one T of every lane; x[lane]
//   each_lane(fn)                   fn(lane) by every lane
//   ballot(test)                    bit l is test(l), the same word in all lanes
//   sum(value)                      of value(lane), an int, uint64_t or float, over all lanes;
//                                   floats in another order on each machine
//   greatest(value)                 the largest value(lane), an int, over all lanes
//   broadcast(values, lane)         that lane's part of a PerLane; inside each_lane, by all lanes
//                                   together, each may ask for another one
//   first_lane(fn)                  fn() by one lane alone, its result in all
//   warp_sync()                     what a lane has stored is there for the others
//
// What stands outside each_lane is the same in all lanes. fn, test and value see no other lane.
#pragma once
#include "prim/prim.h"

#if defined(__CUDACC__)
#include "prim/sm90_warp.h"
#else
#include "prim/host_warp.h"
#endif
