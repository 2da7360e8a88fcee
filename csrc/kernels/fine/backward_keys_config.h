// SPDX-License-Identifier: Apache-2.0
// What the backward's pass over key tiles is built of, by head_dim: in two passes, and in one.
#pragma once
#include "kernels/fine/query_halves.h"
#include "kernels/schedule/rings.h"

namespace vsa {

template <class Element_, int D_>
struct FineBackwardKeysConfig {
  using Element = Element_;
  static constexpr int D = D_;
  static constexpr int kConsumers = 2;
  using Rings =  // of dO, of Q
      std::conditional_t<D == 128, TwoRings<4, 5, kConsumers>, OneRing<11, kConsumers>>;
  static constexpr int kScheduleWords = 8, kChunkLoads = D == 128 ? 96 : 64;
  // Of a consumer's registers, 64 x 64 numbers in fp32 take 32. At 128, dK and dV take 64 each, S^T
  // and dP^T 32 each, and P^T, later dS^T, 16: 208 of 240. At 64 it is 144 of 232, and K and V find
  // room, 16 each: products with both operands in shared memory are limited by reading them
  // (bench/log/backward-passes.md).
  static constexpr bool kKeysInRegisters = D == 64;
  // Three warpgroups have 3 x 168 registers per thread, so that the one of producers and scheduler
  // keeps what two consumers leave. 240 is the most that a consumer is given, 24 the least.
  static constexpr int kProducerRegisters = D == 128 ? 24 : 40;
  static constexpr int kConsumerRegisters = D == 128 ? 240 : 232;
  using Sums = NoQuerySums;
};

// The backward in one pass, which makes dQ as well. Two key tiles meet in the queries that both
// were selected by, so those come first. At 64, dS^T goes to a reducer; at 128 registers do not
// suffice for one, and the consumers make dQ themselves.
template <class Element, int D>
struct FineBackwardOnePassConfig;

template <class Element>
struct FineBackwardOnePassConfig<Element, 64> : FineBackwardKeysConfig<Element, 64> {
  using Rings = OneRing<5, 2>;
  using Sums = QuerySums<2, 4>;
  // Four warpgroups share 512 registers per thread.
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 208;
  static constexpr int kReducerRegisters = 72;
};

template <class Element>
struct FineBackwardOnePassConfig<Element, 128> : FineBackwardKeysConfig<Element, 128> {
  using Rings = TwoRings<3, 3, 2>;
  using Sums = QueryHalves<2>;
};

}  // namespace vsa
