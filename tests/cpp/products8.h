// SPDX-License-Identifier: Apache-2.0
// 8-bit products in the shape of attention, on one tile: what forward kernels do between their
// rings and their softmax, with weights simple enough to be checked exactly.
//
//   scores = Q K^T      Q in registers, and once more in shared memory
//   weights = scores mod 8
//   out = weights V, and row sums of the weights by rows of ones behind V
#pragma once
#include "tile/byte_tile.h"

namespace vsa::test {

enum class Mutant8 {
  None,
  WrongRows,        // K's rows are taken for ones of the other length
  HalfStep,         // a product begins between two steps
  WrongGroup,       // ... or at another row
  NoOnes,           // V's tile ends before the rows of ones
  PlainQueries,     // Q is read in plain order
  OperandInFlight,  // weights are packed while the product that reads them runs
  NoFence,          // registers are touched, and no fence follows
  KeysInOrder,      // V's keys stand in their own order
};

// Scores: int, float or Fp16, the accumulator of the scores
template <class Element_, int D_, class Scores, Mutant8 mutant = Mutant8::None>
struct Products8 {
  using Element = Element_;
  static constexpr int D = D_, kOut = D + 8, kConsumers = 1;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads;
  static constexpr int kProducers = 1;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr int kNumbers = std::is_same_v<Scores, Fp16> ? 2 : 1;  // in a register

  struct Params {
    const unsigned char *q, *k, *v;  // images
    float* scores;                   // [2, 64, 64], Q in registers and in shared memory
    float* out;                      // [64, kOut]
  };
  struct SharedMemory {
    ByteTile<64, D> q, k;
    ByteTile<kOut, kHalfRowBytes> v;
    Mbarrier full;
  };

  static VSA_DEVICE void init_barriers(SharedMemory& s) {
    s.full.init(1, "full", 0);
    label(s.q, "q", 0);
    label(s.k, "k", 0);
    if constexpr (mutant == Mutant8::NoOnes)
      label(*reinterpret_cast<ByteTile<D, kHalfRowBytes>*>(&s.v), "v", 0);
    else
      label(s.v, "v", 0);
  }
  static VSA_DEVICE void prologue(const Params&, SharedMemory&, int, int) {}

  static VSA_DEVICE void produce(const Params& p, SharedMemory& s, int) {
    if (!elect_lane()) return;
    s.full.arrive_expect_tx(sizeof s.q + sizeof s.k + sizeof s.v);
    bulk_load(&s.q, p.q, sizeof s.q, s.full,
              mutant == Mutant8::PlainQueries ? Layout::Linear : kByteLayout<D>);
    bulk_load(&s.k, p.k, sizeof s.k, s.full, kByteLayout<D>);
    bulk_load(&s.v, p.v, sizeof s.v, s.full, kByteLayout<kHalfRowBytes>);
  }

  static VSA_DEVICE void consume(const Params& p, SharedMemory& s, int) {
    Operand8<D> q;
    Operand8<64> weights;
    Fragment<64, Scores> scores;
    Fragment<kOut> out;
    s.full.wait(0);
    read_tile(q, s.q);
    if constexpr (mutant == Mutant8::WrongRows || mutant == Mutant8::HalfStep ||
                  mutant == Mutant8::WrongGroup) {
      constexpr int kOther = mutant != Mutant8::WrongRows ? D : D == 64 ? kRowBytes : kHalfRowBytes;
      const int off = mutant == Mutant8::HalfStep ? 16 : mutant == Mutant8::WrongGroup ? D : 0;
      wgmma_fence();
      wgmma8<Element>(scores, q, 0, bytes_descriptor<kOther>(s.k.address() + off, 0), false);
    } else if constexpr (mutant == Mutant8::NoFence) {
      wgmma8<Element>(scores, q, 0, bytes_descriptor<D>(s.k.address(), 0), false);
    } else {
      mma8_ABt<Element>(scores, q, s.k);
    }
    wgmma_commit();
    wgmma_wait<0>(scores);
    keep(p.scores, scores);
    mma8_ABt<Element>(scores, s.q, s.k);
    wgmma_commit();
    wgmma_wait<0>(scores);
    keep(p.scores + 64 * 64, scores);
    weigh(weights, scores);
    mma8_ABt<E4m3>(out, weights, s.v);
    wgmma_commit();
    if constexpr (mutant == Mutant8::OperandInFlight) weigh(weights, scores);
    wgmma_wait<0>(out);
    VSA_EACH_LANE(t) {
      const auto& x = lane(out, t);
      VSA_UNROLL
      for (int i = 0; i < kOut / 2; ++i)
        p.out[accumulator_row(t, i) * kOut + accumulator_column(t, i)] = x[i];
    }
  }

 private:
  static VSA_DEVICE float number(int x, int) { return static_cast<float>(x); }
  static VSA_DEVICE float number(float x, int) { return x; }
  static VSA_DEVICE float number(uint32_t x, int which) {
    return which == 0 ? widen_low<Fp16>(x) : widen_high<Fp16>(x);
  }

  static VSA_DEVICE void keep(float* to, const Fragment<64, Scores>& scores) {
    VSA_EACH_LANE(t) {
      const auto& x = lane(scores, t);
      VSA_UNROLL
      for (int i = 0; i < 32; ++i)
        to[accumulator_row(t, i) * 64 + accumulator_column(t, i)] =
            number(x[i / kNumbers], i % kNumbers);
    }
  }
  static VSA_DEVICE void weigh(Operand8<64>& weights, const Fragment<64, Scores>& scores) {
    VSA_EACH_LANE(t) {
      const auto& x = lane(scores, t);
      auto& fours = lane(weights, t);
      uint32_t codes[16];
      VSA_UNROLL
      for (int p = 0; p < 16; ++p) {
        codes[p] = 0;
        VSA_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int n = 2 * p + i;
          const float score = number(x[n / kNumbers], n % kNumbers);
          const auto weight = static_cast<float>(static_cast<int>(score) & 7);
          codes[p] |= (pack8<E4m3>(weight, 0, 0, 0) & 0xff) << 16 * i;
        }
      }
      VSA_UNROLL
      for (int r = 0; r < 8; ++r) fours[r] = four_codes(codes, r);
    }
  }
};

}  // namespace vsa::test
