// SPDX-License-Identifier: Apache-2.0
// Loops of a backward in one pass over key tiles that were chosen by the same queries: two key
// tiles of a block, one for each consumer, and query tiles that both meet. Gradients of scores meet
// in shared memory, and dQ of both key tiles (of four in a cluster of two blocks) is added up on
// chip.
//
//   consumer: scores(next)  dK(held)  dQ of the tile before, if it makes dQ     in flight together
//             wait for scores -> weights; wait for the others -> dQ leaves
//             dP(next)  dV                                                      in flight together
//             wait for dP -> dS; wait for dV -> dS to shared memory
//
//   barriers    arrive                                waits
//   made        consumers: dS of a tile               who makes dQ
//   used        who makes dQ, after its product       consumers
//   staging     see ceilings_sums.h
#pragma once
#include "ceilings_sums.h"

namespace vsa::ceilings {

// Who makes dQ.
enum class Maker {
  Consumers,  // each half of the channels (d 128) or every second query tile (d 64)
  Another     // a warpgroup that does nothing else; at d 128 registers do not suffice for it
};

// Lag: with consumers that make halves, how many steps dQ of a tile is behind dK of it
template <int D_, Maker By, Sum To, int Cluster, int Lag = 0>
struct OnePass {
  static constexpr int D = D_, kConsumers = 2, kProducts = 5, kCluster = Cluster;
  static constexpr bool kThird = By == Maker::Another;
  static constexpr int kWarpgroups = kConsumers + 1 + kThird;
  static constexpr int kThreads = kWarpgroups * kWarpgroupThreads;
  static constexpr int kStages = D == 128 ? 3 : 4;
  static constexpr int kDepth = D == 128 ? 2 : 4;  // of dS
  // Three warpgroups share 504 registers per thread, four 512.
  static constexpr int kRegisters = kThird ? 208 : D == 128 ? 240 : 232;
  static constexpr int kMakerRegisters = 72;
  static constexpr int kProducerRegisters = !kThird && D == 64 ? 40 : 24;
  // At 64, K and V lie in registers. Consumers that make dQ keep weights as they are rounded for
  // dV: with the 32 registers of fp32, ptxas serialises products (C7512).
  static constexpr bool kKeysInRegisters = D == 64, kKeepsWeights = kThird;
  static constexpr int kResults = 2 * kConsumers;
  static_assert(!kThird || D == 64);
  using Sums = Staging<To, Cluster>;

  struct Barriers {
    StageRing<kStages> grad_out, q;
    Mbarrier made[kDepth], used[kDepth];
    typename Sums::Barriers staging;
    Exchange::Barriers exchange;

    VSA_DEVICE void init() {
      constexpr int kMakers = kThird || D == 64 ? 1 : kConsumers;
      grad_out.init(kConsumers);
      q.init(kConsumers);
      for (int i = 0; i < kDepth; ++i) {
        made[i].init(kConsumers * kWarpgroupThreads, "made", i);
        used[i].init(kMakers * kWarpgroupThreads, "used", i);
      }
      staging.init();
      exchange.init();
    }
  };
  struct Shared {
    Tile<D> k[kConsumers], v[kConsumers], grad_out[kStages], q[kStages];
    Tile<64> grad_scores[kDepth][kConsumers];  // dS^T: [keys, queries]
    typename Sums::Memory staging;
    alignas(16) float received[Cluster > 1 ? kHalf : 4];
    alignas(16) float delta[kStages][kTileRows], lse[kStages][kTileRows];
    Barriers barriers;
  };

  VSA_DEVICE static void meet() {
    if constexpr (Cluster > 1) Exchange::meet();
  }
  VSA_DEVICE static void run(const BackwardParams& params, Shared& shared, int role) {
    if (role == 0) {
      give_registers<kProducerRegisters>();
      copy(params, shared);
    } else if (role <= kConsumers) {
      take_registers<kRegisters>();
      Consumer(params, shared, role - 1).run();
    } else if constexpr (kThird) {
      give_registers<kMakerRegisters>();
      QueryGradient of(params, shared);
#pragma unroll 1
      for (int n = 0; n < params.steps; ++n) of.make(n);
    }
  }

  // The warps of the first warpgroup: loads, and sums through each buffer.
  VSA_DEVICE static void copy(const BackwardParams& params, Shared& s) {
    const int warp = threadIdx.x / kWarpThreads, buffer = warp - 1;
    if (!elect_lane()) return;
    if (warp == 0) {
      load_both(params, s.grad_out, s.barriers.grad_out, s.q, s.barriers.q);
    } else if (warp <= Sums::kBuffers) {
      const int own = Cluster == 1 ? buffer : Exchange::rank();  // half, or whether tiles are odd
      Sums::template add<D>(params, s.staging, s.barriers.staging, buffer, D == 128 ? 0 : own,
                            D == 128 ? 1 : 2, D == 128 ? own : 0);
    }
  }

  // dQ of a query tile, 64 channels at a time: who makes it, a whole warpgroup.
  class QueryGradient {
   public:
    VSA_DEVICE QueryGradient(const BackwardParams& params, Shared& shared)
        : params_(params), s_(shared) {}

    VSA_DEVICE void wait(int n) { s_.barriers.made[n % kDepth].wait(n / kDepth); }
    VSA_DEVICE void issue(Fragment<64>& sum, int n, int half) {
      VSA_UNROLL
      for (int w = 0; w < kConsumers; ++w)
        mma_AtB<Bf16>(sum, s_.grad_scores[n % kDepth][w], s_.k[w], half, w > 0);
      wgmma_commit();
    }
    // After a wait for the sum.
    VSA_DEVICE void release(int n) { s_.barriers.used[n % kDepth].arrive_all(); }
    VSA_DEVICE void put(Fragment<64>& sum, int n, int half) {
      const int own = D == 128 ? half : n % 2, use = D == 128 ? n : n / 2;
      if constexpr (Cluster > 1) {
        if (own != Exchange::rank()) {
          Exchange::send(s_.received, s_.barriers.exchange, sum, use);
          return;
        }
        Exchange::receive(s_.received, s_.barriers.exchange, sum, use);
      }
      Sums::template put<D>(params_, s_.staging, s_.barriers.staging, sum, n, half,
                            Cluster == 1 ? own : 0, use);
    }

    VSA_DEVICE void make(int n) {
      wait(n);
      Fragment<64> sum;
      issue(sum, n, 0);
      wait_products<0>(sum);
      release(n);
      put(sum, n, 0);
    }

   private:
    const BackwardParams& params_;
    Shared& s_;
  };

  class Consumer {
   public:
    VSA_DEVICE Consumer(const BackwardParams& params, Shared& shared, int w)
        : params_(params), s_(shared), w_(w), grad_q_(params, shared) {}

    VSA_DEVICE void run() {
      fill(grad_k_, 0.f);
      fill(grad_v_, 0.f);
      if constexpr (kKeysInRegisters) {
        read_tile(k_, s_.k[w_]);
        read_tile(v_, s_.v[w_]);
      }
      At held = first_stage(params_.loads);
      s_.barriers.q.wait(held);
      issue_scores(held);
      wait_products<0>(scores_);
      weigh(held);
      s_.barriers.grad_out.wait(held);
      differentiate(held, 0);
      int n = 1;
      if constexpr (kThird) {
#pragma unroll 1
        for (; n < params_.steps; ++n) held = step<false>(held, n, 0);
      } else if constexpr (D == 128) {
        for (; n <= Lag; ++n) held = step<false>(held, n, 0);
#pragma unroll 1
        for (; n < params_.steps; ++n) held = step<true>(held, n, n - 1 - Lag);
      } else {
        // Of two consumers one makes dQ of even tiles, the other of odd ones, in every second step.
        held = step<false>(held, n++, 0);
        held = step<false>(held, n++, 0);
#pragma unroll 1
        for (; n + 1 < params_.steps; n += 2) {
          held = step<true>(held, n, n - 3 + w_);
          held = step<false>(held, n + 1, 0);
        }
        if (n < params_.steps) held = step<false>(held, n, 0);
      }
      issue_grad_k(held);
      wait_products<0>(grad_k_);
      if constexpr (!kThird) make_rest(n);
      keep(params_, grad_k_, 2 * w_, kResults);
      keep(params_, grad_v_, 2 * w_ + 1, kResults);
    }

   private:
    // made: the query tile whose dQ it makes meanwhile
    template <bool MakesSum>
    VSA_DEVICE At step(At held, int n, int made) {
      const At next = following<kStages>(held, params_.loads);
      s_.barriers.q.wait(next);
      issue_scores(next);
      issue_grad_k(held);
      if constexpr (MakesSum) {
        grad_q_.wait(made);
        grad_q_.issue(grad_scores_, made, own_half());
      }
      wait_products<MakesSum ? 2 : 1>(scores_);
      weigh(next);
      s_.barriers.grad_out.wait(next);  // a branch between the waits
      if constexpr (Lag == 0) wait_used(n);
      if constexpr (MakesSum) {
        wait_products<0>(grad_k_, grad_scores_);
        s_.barriers.q.release(held);
        grad_q_.release(made);
        grad_q_.put(grad_scores_, made, own_half());
      } else {
        wait_products<0>(grad_k_);
        s_.barriers.q.release(held);
      }
      differentiate(next, n);
      return next;
    }
    // For room where dS of step n goes. Without a lag it is asked for early: ptxas then keeps the
    // exponentials above the wait for products.
    VSA_DEVICE void wait_used(int n) { s_.barriers.used[n % kDepth].wait(n / kDepth - 1); }

    // What is left when the loop ends before step `end`.
    VSA_DEVICE void make_rest(int end) {
      const int made = D == 128 ? params_.steps - 1 - Lag : end - 3 + w_;
#pragma unroll 1
      for (int n = made; n < params_.steps; n += D == 128 ? 1 : 2) {
        grad_q_.wait(n);
        grad_q_.issue(grad_scores_, n, own_half());
        wait_products<0>(grad_scores_);
        grad_q_.release(n);
        grad_q_.put(grad_scores_, n, own_half());
      }
    }
    VSA_DEVICE int own_half() const { return D == 128 ? w_ : 0; }

    VSA_DEVICE void issue_scores(At at) {
      if constexpr (kKeysInRegisters)
        mma_ABt<Bf16>(scores_, k_, s_.q[at.stage()]);
      else
        mma_ABt<Bf16>(scores_, s_.k[no_hoist(w_)], s_.q[at.stage()]);
      wgmma_commit();
    }
    VSA_DEVICE void issue_grad_k(At at) {
      mma_AB<Bf16>(grad_k_, rounded_, s_.q[at.stage()]);
      wgmma_commit();
    }
    VSA_DEVICE void weigh(At at) {
      const float scale = params_.scale;
      map_columns(scores_, s_.lse[at.stage()],
                  [=](float x, float lse) { return exp2_approx(fma(x, scale, -lse)); });
    }

    VSA_DEVICE void differentiate(At at, int n) {
      round_to<Bf16>(rounded_, scores_);
      Operand<64> weights;  // the operand of a product in flight must not be read
      if constexpr (!kKeepsWeights) copy(weights, rounded_);
      if constexpr (kKeysInRegisters)
        mma_ABt<Bf16>(grad_scores_, v_, s_.grad_out[at.stage()]);
      else
        mma_ABt<Bf16>(grad_scores_, s_.v[no_hoist(w_)], s_.grad_out[at.stage()]);
      wgmma_commit();
      mma_AB<Bf16>(grad_v_, rounded_, s_.grad_out[at.stage()]);
      wgmma_commit();
      wait_products<1>(grad_scores_);
      map_columns(grad_scores_, s_.delta[at.stage()],
                  [](float x, float delta) { return x - delta; });
      if constexpr (kKeepsWeights)
        zip(grad_scores_, scores_, [](float x, float weight) { return x * weight; });
      else
        multiply(grad_scores_, weights);
      if constexpr (Lag > 0) wait_used(n);
      wait_products<0>(grad_v_);
      s_.barriers.grad_out.release(at);
      round_to<Bf16>(rounded_, grad_scores_);
      store_matrices(s_.grad_scores[n % kDepth][w_], rounded_);
      fence_async_proxy();
      s_.barriers.made[n % kDepth].arrive_all();
    }
    VSA_DEVICE static void copy(Operand<64>& to, const Operand<64>& from) {
      VSA_UNROLL
      for (int i = 0; i < 16; ++i) asm volatile("mov.b32 %0, %1;" : "=r"(to.x[i]) : "r"(from.x[i]));
    }
    VSA_DEVICE static void multiply(Fragment<64>& f, const Operand<64>& by) {
      VSA_UNROLL
      for (int i = 0; i < 16; ++i) {
        f.x[2 * i] *= widen_low<Bf16>(by.x[i]);
        f.x[2 * i + 1] *= widen_high<Bf16>(by.x[i]);
      }
    }

    const BackwardParams& params_;
    Shared& s_;
    const int w_;
    QueryGradient grad_q_;
    Fragment<64> scores_;       // [keys, queries]
    Fragment<64> grad_scores_;  // likewise; dQ before that, [queries, 64]
    Operand<D> k_, v_;
    Operand<64> rounded_;
    Fragment<D> grad_k_, grad_v_;
  };
};

}  // namespace vsa::ceilings
