// SPDX-License-Identifier: Apache-2.0
// The loop of a forward's consumers: scores, softmax, output, without a schedule. Either every tile
// is there from the first, or tiles come from L2 into rings as deep as a kernel's, each for those
// consumers that a pattern names. Scores of several tiles are one product, whose columns are the
// keys of all of them.
#pragma once
#include "ceilings_part_softmax.h"
#include "ceilings_stages.h"
#include "kernels/fine/softmax.h"
#include "kernels/schedule/rings.h"

namespace vsa::ceilings {

// What is in flight behind a consumer's softmax.
enum class Behind {
  Output,   // the product of the weights before
  Maximum,  // behind the rows' maxima the same product, and nothing behind the exponentials
  Half,     // behind the second half of the exponentials the product of the first half's weights
  Nothing   // of its own: other consumers' products are
};

// When consumers issue products.
enum class Turns {
  Free,    // when they come to it
  Ordered  // each when the one before it has issued its own
};

// Which consumers want each load, over and over: bit i of owners[w] says that w wants load i.
struct Pattern {
  const char* name;
  int period, of_each;  // loads; of these, what each consumer wants
  uint32_t owners[4];
};

struct LoopParams {
  TensorMap map;
  int tiles;  // to draw loads from
  int steps;  // of each consumer, a multiple of what it wants of a period
  bool loads;
  Pattern pattern;
  float scale;
  uint32_t seed;
  Report report;
  // To compare with double precision, else null: what shared memory was filled with, and of each
  // consumer the output [64, D] and the log-sum-exp [64], block by block.
  unsigned char* images;
  float* results;
};

// Tiles: key tiles in a softmax step. QueriesInRegisters: the left operand of scores
template <int D_,
          int Consumers,
          int Tiles,
          Behind Order,
          bool QueriesInRegisters,
          Turns When = Turns::Free>
struct Loop {
  static constexpr int D = D_, kConsumers = Consumers, kTiles = Tiles;
  static constexpr Behind kOrder = Order;
  static constexpr Turns kWhen = When;
  static constexpr bool kInParts = Order == Behind::Half || Order == Behind::Maximum;
  static constexpr bool kQueriesInRegisters = QueriesInRegisters;
  static constexpr int kThreads = (Consumers + 1) * kWarpgroupThreads;
  static constexpr int kColumns = Tiles * kTileRows, kTileBytes = kTileRows * D * 2;
  // Stages of Tiles tiles: what fits, and values more where a tile of them is held for longer.
  static constexpr int kKeyStages = (D == 64 ? 8 : Consumers == 3 ? 4 : 6) / Tiles;
  static constexpr int kValueStages = (D == 64 ? 12 : 6) / Tiles;
  static constexpr int kRegisters = Consumers == 4   ? 112
                                    : Consumers == 2 ? 240
                                    : Tiles == 2     ? 160
                                                     : 152;
  static constexpr int kProducerRegisters = Consumers == 2 ? 24 : kRegisters == 152 ? 56 : 32;
  static constexpr int kResults = kTileRows * (D + 1);  // floats of a consumer

  struct Shared {
    Tile<D> q[Consumers];
    alignas(kSwizzleBytes) unsigned char k[kKeyStages][Tiles * kTileBytes];  // panels of kColumns
    Tile<D> v[kValueStages][Tiles];
    SkippableRing<kKeyStages, Consumers> keys;
    SkippableRing<kValueStages, Consumers> values;
  };
  static_assert(sizeof(Shared) <= kSharedBytes);

  // The loads that a consumer wants, one after the other.
  class Position {
   public:
    VSA_DEVICE Position(const LoopParams& params, int w)
        : wanted_(params.pattern.owners[w]), period_(params.pattern.period), rest_(wanted_) {
      next();
    }
    VSA_DEVICE void next() {
      if (rest_ == 0) {
        begin_ += period_;
        rest_ = wanted_;
      }
      number_ = begin_ + __ffs(rest_) - 1;
      rest_ &= rest_ - 1;
    }
    VSA_DEVICE int number() const { return number_; }

   private:
    const uint32_t wanted_;
    const int period_;
    uint32_t rest_;
    int begin_ = 0, number_ = 0;
  };

  class Consumer {
   public:
    VSA_DEVICE Consumer(const LoopParams& params, Shared& shared, int own)
        : params_(params), shared_(shared), own_(own), position_(params, own) {}

    VSA_DEVICE void run() {
      fill(out_, 0.f);
      softmax_.reset();
      if constexpr (QueriesInRegisters) read_tile(q_, shared_.q[own_]);
      if (When == Turns::Ordered && own_ == Consumers - 1) pass_turn();
      if constexpr (Order == Behind::Half)
        run_halves();
      else
        run_steps();
      RowValues lse;
      softmax_.finish(out_, lse, params_.scale);
      keep(lse);
    }

   private:
    VSA_DEVICE void run_steps() {
      int held = position_.number();
      wait_keys(held);
      issue_scores(held);
      wait_products<0>(scores_);
      release_keys(held);
      weigh_first();
      wait_values(held);
#pragma unroll 1
      for (int n = 1; n < params_.steps; ++n) {
        position_.next();
        const int next = position_.number();
        wait_keys(next);
        take_turn();
        if constexpr (Order == Behind::Output) {
          issue_scores(next);
          issue_output(held);
          pass_turn();
          wait_products<1>(scores_);
          release_keys(next);
          softmax_.weigh(scores_, params_.scale);
          wait_values(next);  // a branch between the waits
          wait_products<0>(out_);
          release_values(held);
          softmax_.rescale(out_);
          round_to<Bf16>(weights_, scores_);
        } else if constexpr (Order == Behind::Maximum) {
          issue_scores(next);
          issue_output(held);
          pass_turn();
          wait_products<1>(scores_);
          release_keys(next);
          softmax_.measure(scores_, params_.scale);
          wait_products<0>(out_);
          release_values(held);
          softmax_.rescale(out_);
          softmax_.template weigh_part<0, kColumns / 2>(weights_, scores_, params_.scale);
          wait_values(next);
        } else {
          issue_output(held);
          wait_products<0>(out_);
          release_values(held);
          issue_scores(next);
          pass_turn();
          wait_products<0>(scores_);
          release_keys(next);
          softmax_.weigh(scores_, params_.scale);
          wait_values(next);
          softmax_.rescale(out_);
          round_to<Bf16>(weights_, scores_);
        }
        held = next;
      }
      issue_output(held);
      wait_products<0>(out_);
      release_values(held);
    }

    VSA_DEVICE void weigh_first() {
      if constexpr (Order == Behind::Maximum) {
        softmax_.measure(scores_, params_.scale);
        softmax_.rescale(out_);
        softmax_.template weigh_part<0, kColumns / 2>(weights_, scores_, params_.scale);
      } else {
        softmax_.weigh(scores_, params_.scale);
        softmax_.rescale(out_);
        round_to<Bf16>(weights_, scores_);
      }
    }

    VSA_DEVICE void run_halves() {
      int held = position_.number();
      wait_keys(held);
      issue_scores(held);
      wait_products<0>(scores_);
      release_keys(held);
#pragma unroll 1
      for (int n = 1; n < params_.steps; ++n) {
        weigh_halves(held);
        position_.next();
        const int next = position_.number();
        wait_keys(next);
        take_turn();
        issue_scores(next);
        pass_turn();
        wait_products<0>(scores_, out_);
        release_values(held);
        release_keys(next);
        held = next;
      }
      weigh_halves(held);
      wait_products<0>(out_);
      release_values(held);
    }
    VSA_DEVICE void weigh_halves(int n) {
      softmax_.measure(scores_, params_.scale);
      softmax_.rescale(out_);
      weigh_half<0>();
      wait_values(n);
      issue_half<0>(n);
      weigh_half<1>();
      issue_half<1>(n);
    }
    template <int Half>
    VSA_DEVICE void weigh_half() {
      constexpr int kRegisters = kColumns / 4;
      softmax_.template weigh_part<Half * kRegisters, kRegisters>(weights_, scores_, params_.scale);
    }
    template <int Half>
    VSA_DEVICE void issue_half(int n) {
      issue_values<Half * kColumns / kReduction / 2, kColumns / kReduction / 2>(n);
    }
    VSA_DEVICE void issue_output(int n) { issue_values<0, kColumns / kReduction>(n); }

    VSA_DEVICE void issue_scores(int n) {
      const uint32_t at = smem_address(shared_.k[Ring<kKeyStages>::stage(n)]);
      const uint64_t keys = descriptor(at, kChunkBytes, kSwizzleBytes);
      wgmma_fence();
      VSA_UNROLL
      for (int i = 0; i < D / kReduction; ++i) {
        const uint64_t b = advance(keys, i / 4 * Tiles * kPanelBytes + i % 4 * kReduction * 2);
        if constexpr (QueriesInRegisters)
          wgmma<Bf16, false>(scores_, q_, i, b, i > 0);
        else
          wgmma<Bf16, false, false>(scores_, channels_descriptor(shared_.q[own_].address(), i), b,
                                    i > 0);
      }
      wgmma_commit();
    }
    template <int First, int Count>
    VSA_DEVICE void issue_values(int n) {
      const Tile<D>* tiles = shared_.v[Ring<kValueStages>::stage(n)];
      wgmma_fence();
      VSA_UNROLL
      for (int i = First; i < First + Count; ++i)
        wgmma<Bf16, true>(out_, weights_, i, rows_descriptor(tiles[i / 4].address(), i % 4), true);
      wgmma_commit();
    }

    VSA_DEVICE void wait_keys(int n) { wait(shared_.keys, n); }
    VSA_DEVICE void wait_values(int n) { wait(shared_.values, n); }
    VSA_DEVICE void release_keys(int n) {
      shared_.keys.empty[Ring<kKeyStages>::stage(n)].arrive_all();
    }
    VSA_DEVICE void release_values(int n) {
      shared_.values.empty[Ring<kValueStages>::stage(n)].arrive_all();
    }
    template <int Stages>
    VSA_DEVICE void wait(SkippableRing<Stages, Consumers>& ring, int n) {
      const RingUse at = RingUse::of<Stages>(n);
      ring.full[at.barrier].wait(params_.loads ? at.phase : -1);
    }

    VSA_DEVICE void take_turn() {
      if constexpr (When == Turns::Ordered)
        asm volatile("bar.sync %0, 256;" ::"r"(1 + own_) : "memory");
    }
    VSA_DEVICE void pass_turn() {
      if constexpr (When == Turns::Ordered)
        asm volatile("bar.arrive %0, 256;" ::"r"(1 + (own_ + 1) % Consumers) : "memory");
    }

    // Results where they are wanted; otherwise their sum, so that no product is dropped.
    VSA_DEVICE void keep(const RowValues& lse) {
      float sum = lse.x[0];
      for_each(out_, [&](float& x, int, int) { sum += x; });
      params_.report.sink[blockIdx.x * blockDim.x + threadIdx.x] = sum;
      if (params_.results == nullptr) return;
      float* to = params_.results + (size_t{blockIdx.x} * Consumers + own_) * kResults;
      for_each(out_, [&](float& x, int row, int column) { to[row * D + column] = x; });
      for_each_row(lse, [&](float x, int row) { to[kTileRows * D + row] = x; });
    }

    const LoopParams& params_;
    Shared& shared_;
    const int own_;
    Position position_;
    std::conditional_t<kInParts, PartSoftmax, Softmax> softmax_;
    Operand<D> q_;
    Fragment<kColumns> scores_;
    Operand<kColumns> weights_;
    Fragment<D> out_;
  };

  // One thread each for keys and values: random tiles, a stage of them after the other.
  template <int Stages, class Copy>
  VSA_DEVICE static void load(const LoopParams& params,
                              SkippableRing<Stages, Consumers>& ring,
                              uint32_t salt,
                              Copy copy) {
    const Pattern& pattern = params.pattern;
    const int loads = params.loads ? params.steps / pattern.of_each * pattern.period : 0;
    for (int n = 0; n < loads; ++n) {
      uint32_t wanted = 0;
      for (int w = 0; w < Consumers; ++w)
        wanted |= (pattern.owners[w] >> n % pattern.period & 1) << w;
      Mbarrier& full = ring.acquire(n, Tiles * kTileBytes);
      ring.skip(n, wanted);
      for (int i = 0; i < Tiles; ++i) {
        const int tile = drawn(params.seed + salt, blockIdx.x, n * Tiles + i, params.tiles);
        copy(n, i, {0, tile % 8 * 4, tile / 8 % 8 * 4, tile / kTilesPerLayer * 4, 0}, full);
      }
    }
  }
  VSA_DEVICE static void load_keys(const LoopParams& params, Shared& shared) {
    load(params, shared.keys, 0, [&](int n, int i, BoxCoordinates at, Mbarrier& full) {
      unsigned char* to = shared.k[Ring<kKeyStages>::stage(n)] + i * kPanelBytes;
      for (int panel = 0; panel < D / kPanelChannels; ++panel, at.channel += kPanelChannels)
        tma_load_panel(to + panel * Tiles * kPanelBytes, params.map, at, full);
    });
  }
  VSA_DEVICE static void load_values(const LoopParams& params, Shared& shared) {
    load(params, shared.values, 1, [&](int n, int i, BoxCoordinates at, Mbarrier& full) {
      load_tile(shared.v[Ring<kValueStages>::stage(n)][i], params.map, at, full);
    });
  }
};

template <class Loop>
__global__ void __launch_bounds__(Loop::kThreads, 1)
    loops(const __grid_constant__ LoopParams params) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<typename Loop::Shared*>(memory);
  fill_image(memory, offsetof(typename Loop::Shared, keys), params.images);
  auto* clocks = reinterpret_cast<unsigned long long*>(params.report.clocks) + blockIdx.x;
  if (threadIdx.x == 0) {
    *clocks = 0;
    shared.keys.init("keys_full", "keys_empty");
    shared.values.init("values_full", "values_empty");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  const int warp = __shfl_sync(~0u, threadIdx.x, 0) / kWarpThreads;
  const int role = warp / 4;
  const long long start = clock64();
  if (role == 0) {
    give_registers<Loop::kProducerRegisters>();
    if (warp == 0 && elect_lane()) Loop::load_keys(params, shared);
    if (warp == 1 && elect_lane()) Loop::load_values(params, shared);
  } else {
    take_registers<Loop::kRegisters>();
    typename Loop::Consumer(params, shared, role - 1).run();
    // The consumer that ends last: tensor cores do not serve all alike.
    if (threadIdx.x % kWarpgroupThreads == 0)
      atomicMax(clocks, static_cast<unsigned long long>(clock64() - start));
  }
}

}  // namespace vsa::ceilings
