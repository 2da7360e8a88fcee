// SPDX-License-Identifier: Apache-2.0
// The loops of the two passes of the present backward (kernels/fine/backward_keys.h and
// backward_queries.h), in the order in which the kernels do things, without their schedule.
#pragma once
#include "ceilings_stages.h"

namespace vsa::ceilings {

// Gradients of keys and values: each of two consumers has a key tile.
template <int D_>
struct KeyLoop {
  static constexpr int D = D_, kConsumers = 2, kProducts = 4, kStages = D == 128 ? 4 : 8;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads, kCluster = 1;
  static constexpr int kRegisters = D == 128 ? 240 : 232, kProducerRegisters = D == 128 ? 24 : 40;
  static constexpr bool kKeysInRegisters = D == 64;
  static constexpr int kResults = 2 * kConsumers;  // dK, dV of each key tile

  struct Barriers {
    StageRing<kStages> grad_out, q;
    VSA_DEVICE void init() {
      grad_out.init(kConsumers);
      q.init(kConsumers);
    }
  };
  struct Shared {
    Tile<D> k[kConsumers], v[kConsumers], grad_out[kStages], q[kStages];
    alignas(16) float delta[kStages][kTileRows], lse[kStages][kTileRows];
    Barriers barriers;
  };

  VSA_DEVICE static void meet() {}
  VSA_DEVICE static void run(const BackwardParams& params, Shared& shared, int role) {
    if (role == 0) {
      give_registers<kProducerRegisters>();
      if (threadIdx.x < kWarpThreads && elect_lane())
        load_both(params, shared.grad_out, shared.barriers.grad_out, shared.q, shared.barriers.q);
    } else {
      take_registers<kRegisters>();
      Consumer(params, shared, role - 1).run();
    }
  }

  class Consumer {
   public:
    VSA_DEVICE Consumer(const BackwardParams& params, Shared& shared, int w)
        : params_(params), s_(shared), w_(w) {}

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
      differentiate(held);
#pragma unroll 1
      for (int n = 1; n < params_.steps; ++n) {
        const At next = following<kStages>(held, params_.loads);
        s_.barriers.q.wait(next);
        issue_scores(next);
        issue_grad_k(held);
        wait_products<1>(scores_);
        weigh(next);
        s_.barriers.grad_out.wait(next);  // a branch between the waits
        wait_products<0>(grad_k_);
        s_.barriers.q.release(held);
        differentiate(next);
        held = next;
      }
      issue_grad_k(held);
      wait_products<0>(grad_k_);
      keep(params_, grad_k_, 2 * w_, kResults);
      keep(params_, grad_v_, 2 * w_ + 1, kResults);
    }

   private:
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
    VSA_DEVICE void differentiate(At at) {
      round_to<Bf16>(rounded_, scores_);
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
      zip(grad_scores_, scores_, [](float x, float weight) { return x * weight; });
      wait_products<0>(grad_v_);
      s_.barriers.grad_out.release(at);
      round_to<Bf16>(rounded_, grad_scores_);
    }

    const BackwardParams& params_;
    Shared& s_;
    const int w_;
    Fragment<64> scores_, grad_scores_;  // [keys, queries]
    Operand<D> k_, v_;
    Operand<64> rounded_;
    Fragment<D> grad_k_, grad_v_;
  };
};

// Gradients of queries: each consumer has a query tile.
template <int D_>
struct QueryLoop {
  static constexpr int D = D_, kConsumers = D == 128 ? 2 : 3, kProducts = 3;
  static constexpr int kStages = D == 128 ? 5 : 8, kCluster = 1;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads;
  static constexpr int kRegisters = kConsumers == 2 ? 240 : 152;
  static constexpr int kProducerRegisters = kConsumers == 2 ? 24 : 56;
  static constexpr bool kQueriesInRegisters = D == 128;
  static constexpr int kResults = kConsumers;

  struct Barriers {
    StageRing<kStages> v, k;
    VSA_DEVICE void init() {
      v.init(kConsumers);
      k.init(kConsumers);
    }
  };
  struct Shared {
    Tile<D> q[kConsumers], grad_out[kConsumers], v[kStages], k[kStages];
    alignas(16) float delta[kConsumers][kTileRows], lse[kConsumers][kTileRows];
    Barriers barriers;
  };

  VSA_DEVICE static void meet() {}
  VSA_DEVICE static void run(const BackwardParams& params, Shared& shared, int role) {
    if (role == 0) {
      give_registers<kProducerRegisters>();
      if (threadIdx.x < kWarpThreads && elect_lane())
        load_both(params, shared.v, shared.barriers.v, shared.k, shared.barriers.k);
    } else {
      take_registers<kRegisters>();
      Consumer(params, shared, role - 1).run();
    }
  }

  class Consumer {
   public:
    VSA_DEVICE Consumer(const BackwardParams& params, Shared& shared, int w)
        : params_(params), s_(shared), w_(w) {}

    VSA_DEVICE void run() {
      fill(grad_q_, 0.f);
      set_rows(lse_, [&](int row) { return s_.lse[w_][row]; });
      set_rows(delta_, [&](int row) { return s_.delta[w_][row]; });
      if constexpr (kQueriesInRegisters) {
        read_tile(q_, s_.q[w_]);
        read_tile(grad_out_, s_.grad_out[w_]);
      }
      At held = first_stage(params_.loads);
      wait(held);
      issue_scores(held);
      wait_products<0>(scores_, grad_scores_);
      s_.barriers.v.release(held);
      differentiate();
      round_to<Bf16>(rounded_, grad_scores_);
#pragma unroll 1
      for (int n = 1; n < params_.steps; ++n) {
        const At next = following<kStages>(held, params_.loads);
        wait(next);
        issue_scores(next);
        issue_gradient(held);
        wait_products<1>(scores_, grad_scores_);
        s_.barriers.v.release(next);
        differentiate();
        s_.barriers.k.wait(next);  // over long since: a branch between the waits
        wait_products<0>(grad_q_);
        s_.barriers.k.release(held);
        round_to<Bf16>(rounded_, grad_scores_);
        held = next;
      }
      issue_gradient(held);
      wait_products<0>(grad_q_);
      keep(params_, grad_q_, w_, kResults);
    }

   private:
    VSA_DEVICE void wait(At at) {
      s_.barriers.v.wait(at);
      s_.barriers.k.wait(at);
    }
    VSA_DEVICE void issue_scores(At at) {
      if constexpr (kQueriesInRegisters) {
        mma_ABt<Bf16>(scores_, q_, s_.k[at.stage()]);
        mma_ABt<Bf16>(grad_scores_, grad_out_, s_.v[at.stage()]);
      } else {
        mma_ABt<Bf16>(scores_, s_.q[w_], s_.k[at.stage()]);
        mma_ABt<Bf16>(grad_scores_, s_.grad_out[w_], s_.v[at.stage()]);
      }
      wgmma_commit();
    }
    VSA_DEVICE void issue_gradient(At at) {
      mma_AB<Bf16>(grad_q_, rounded_, s_.k[at.stage()]);
      wgmma_commit();
    }
    VSA_DEVICE void differentiate() {
      const float scale = params_.scale;
      map_rows(scores_, lse_, [=](float x, float lse) { return exp2_approx(fma(x, scale, -lse)); });
      map_rows(grad_scores_, delta_, [](float x, float delta) { return x - delta; });
      zip(grad_scores_, scores_, [](float x, float weight) { return x * weight; });
    }

    const BackwardParams& params_;
    Shared& s_;
    const int w_;
    RowValues lse_, delta_;
    Fragment<64> scores_, grad_scores_;  // [queries, keys]
    Operand<D> q_, grad_out_;
    Operand<64> rounded_;
    Fragment<D> grad_q_;
  };
};

}  // namespace vsa::ceilings
