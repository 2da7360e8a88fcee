// SPDX-License-Identifier: Apache-2.0
// A consumer of the backward at head_dim 128 that makes dQ of the tiles where consumers meet. It
// computes one key tile, as those of the pass over keys do. Of a tile held where they meet:
//
//     scores(next)    dK += dS^T Q    dQ = sum of dS K                in flight together
//     wait for scores -> weights
//     wait for dK and dQ -> release Q(held); dQ leaves
//     dP(next)        dV += P^T dO                                    in flight together
//     wait for dP -> dS, from weights as they are rounded for dV
//     wait for dV -> release dO(next); dS -> shared memory, if they meet in next
//
// With weights in fp32 ptxas finds no registers, and serialises products (bench/log/one-pass.md).
#pragma once
#include "kernels/fine/query_halves.h"
#include "kernels/schedule/resident_tiles.h"
#include "kernels/schedule/rings.h"

namespace vsa {

template <class Kernel>
class OnePassConsumer {
 public:
  using Element = typename Kernel::Element;
  using Params = typename Kernel::Params;
  using SharedMemory = typename Kernel::SharedMemory;
  static constexpr int D = Kernel::D;
  static_assert(D == 128 && Kernel::kConsumers == 2, "each consumer makes one half where two meet");

  VSA_DEVICE OnePassConsumer(const Params& p, SharedMemory& s, int w)
      : p_(p), s_(s), w_(w), steps_(s.schedule, s.rings, w) {}

  VSA_DEVICE void run() {
    s_.resident.for_each_work_tile(w_, [&](const Assignment& work) {
      rows_ = work.tile < 0 ? 0 : p_.keys.rows(p_.keys.place(work.tile), work.batch);
      batch_ = work.batch;
      mainloop();
      if (work.tile >= 0) store(work);
    });
    if (elect_one()) bulk_wait<0>();
  }

 private:
  VSA_DEVICE void mainloop() {
    fill(grad_k_, 0.f);
    fill(grad_v_, 0.f);
    const auto wait = [&](const ConsumerStep& step) { s_.rings.wait_second(step); };
    ConsumerStep held = steps_.first();
    while (held.is(ConsumerStep::kCompute)) {
      s_.rings.wait_second(held);
      issue_scores(held);
      wgmma_wait<0>(scores_);
      weigh(held);
      s_.rings.wait_first(held);
      differentiate(held);
      hand_over();
      ConsumerStep next = steps_.next_compute(steps_.take(), wait);
      while (next.is(ConsumerStep::kCompute)) {
        const ConsumerStep after = steps_.take();
        if (held.meets())
          advance_together(held, next);
        else
          advance_alone(held, next);
        const bool there = after.is(ConsumerStep::kCompute) && s_.rings.has_second(after);
        differentiate(next);
        held = next;
        if (!there) hand_over();
        next = there ? after : steps_.next_compute(after, wait);
      }
      finish(held);
      held = steps_.resume(next);
    }
    steps_.end_work_tile();
  }

  // The products of the tile held, beside scores and weights of the next one.
  VSA_DEVICE void advance_together(const ConsumerStep& held, const ConsumerStep& next) {
    issue_scores(next);
    issue_grad_k(held);
    hand_over();
    s_.sums.wait_others(met_ - 1);
    issue_half();
    wgmma_wait<2>(scores_);
    weigh(next);
    s_.rings.wait_first(next);
    wgmma_wait<0>(grad_k_, grad_scores_);
    s_.rings.release_second(held);
    add(held);
  }
  VSA_DEVICE void advance_alone(const ConsumerStep& held, const ConsumerStep& next) {
    issue_scores(next);
    issue_grad_k(held);
    wgmma_wait<1>(scores_);
    weigh(next);
    s_.rings.wait_first(next);
    wgmma_wait<0>(grad_k_);
    s_.rings.release_second(held);
  }
  // The products of the last tile of a run.
  VSA_DEVICE void finish(const ConsumerStep& held) {
    issue_grad_k(held);
    if (held.meets()) {
      s_.sums.wait_others(met_ - 1);
      issue_half();
      wgmma_wait<0>(grad_scores_);
      add(held);
    }
    wgmma_wait<0>(grad_k_);
    s_.rings.release_second(held);
  }

  // While products run, for the fence waits for the stores before it; but before waiting for
  // anything, or the other consumer and what waits for it might be waited for.
  VSA_DEVICE void hand_over() {
    if (!owes_) return;
    owes_ = false;
    s_.sums.hand_over();
  }
  VSA_DEVICE void issue_scores(const ConsumerStep& step) {
    mma_ABt<Element>(scores_, s_.k[no_hoist(w_)], s_.q[step.second().stage]);
    wgmma_commit();
  }
  VSA_DEVICE void issue_grad_k(const ConsumerStep& step) {
    mma_AB<Element>(grad_k_, rounded_, s_.q[step.second().stage]);
    wgmma_commit();
  }
  // Of the tile where they have met, its own 64 channels.
  VSA_DEVICE void issue_half() {
    mma_AtB<Element>(grad_scores_, s_.sums.grad_scores[0], s_.k[0], w_, false);
    mma_AtB<Element>(grad_scores_, s_.sums.grad_scores[1], s_.k[1], w_, true);
    wgmma_commit();
  }
  VSA_DEVICE void add(const ConsumerStep& step) {
    s_.sums.release();
    s_.sums.add_to(p_.template sums<D>(batch_, step.sum()) + w_ * kSumsOfPanel, w_, grad_scores_);
  }
  VSA_DEVICE void weigh(const ConsumerStep& step) {
    const float scale = p_.scale_log2;
    map_columns(scores_, s_.lse[step.second().stage],
                [=](float x, float lse) { return exp2_approx(fma(x, scale, -lse)); });
  }
  // From weights to the gradients of scores, rounded. dV is complete afterwards.
  VSA_DEVICE void differentiate(const ConsumerStep& step) {
    round_to<Element>(rounded_, scores_);
    Operand<64> weights;  // the operand of a product in flight must not be read
    copy_registers(weights, rounded_);
    mma_ABt<Element>(grad_scores_, s_.v[no_hoist(w_)], s_.grad_out[step.first().stage]);
    wgmma_commit();
    mma_AB<Element>(grad_v_, rounded_, s_.grad_out[step.first().stage]);
    wgmma_commit();
    wgmma_wait<1>(grad_scores_);
    map_columns(grad_scores_, s_.delta[step.first().stage],
                [](float x, float delta) { return x - delta; });
    multiply<Element>(grad_scores_, weights);
    wgmma_wait<0>(grad_v_);
    s_.rings.release_first(step);
    round_to<Element>(rounded_, grad_scores_);
    // Rows that are no tokens have zeros for keys, but what they are multiplied by may be infinite.
    // Nor may their dK be: it stays where no load of K brings a row.
    if (rows_ != ~uint64_t{0}) keep_rows(rounded_, rows_);
    if (step.meets()) put();
  }

  VSA_DEVICE void put() {
    s_.sums.wait_room(met_++);
    s_.sums.put(w_, rounded_);
    owes_ = true;
  }

  VSA_DEVICE void store(const Assignment& work) {
    const TilePlace at = p_.keys.place(work.tile);
    const float scale = p_.scale;
    for_each(grad_k_, [=](float& x, int, int) { x *= scale; });
    p_.grad_k_means.add_to(grad_k_, p_.keys, p_.kv_heads, work, at);
    p_.grad_v_means.add_to(grad_v_, p_.keys, p_.kv_heads, work, at);
    s_.sums.wait_room(met_);
    Operand<D> rounded;
    round_to<Element>(rounded, grad_k_);
    write_tile(s_.k[w_], rounded);
    round_to<Element>(rounded, grad_v_);
    write_tile(s_.v[w_], rounded);
    fence_async_proxy();
    named_sync(consumer_barrier(w_), kWarpgroupThreads);
    if (elect_one()) {
      const TileBox grad_k = store_box_of(p_.grad_k, at, work.head, work.batch);
      const TileBox grad_v = store_box_of(p_.grad_v, at, work.head, work.batch);
      store_tile(grad_k.map, grad_k.at, s_.k[w_]);
      store_tile(grad_v.map, grad_v.at, s_.v[w_]);
      bulk_commit();
      bulk_wait_read<0>();
    }
  }

  const Params& p_;
  SharedMemory& s_;
  const int w_;
  ConsumerSteps<typename Kernel::QuerySchedule, typename Kernel::Rings> steps_;
  uint64_t rows_ = ~uint64_t{0};  // of the key tile that are tokens
  int batch_ = 0;                 // of the work tile
  int met_ = 0;                   // how often the consumers have met
  bool owes_ = false;             // dS^T has been stored, and not handed over
  Fragment<64> scores_;           // [keys, queries]
  Fragment<64> grad_scores_;      // likewise; and dQ, [queries, 64 channels]
  Operand<64> rounded_;           // P^T, then dS^T
  Fragment<D> grad_k_, grad_v_;
};

}  // namespace vsa
