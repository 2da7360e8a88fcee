// SPDX-License-Identifier: Apache-2.0
// The parts of the platform that attention.h leaves out, in the shape of a backward pass: products
// over the rows of both operands, vectors in shared memory, fp32 sums into global memory.
//
//   P = A B^T * columns    out += P^T B    (bulk reduction, accumulator order)
//   twice = P B + P B      (stored as 16 bits)
#pragma once
#include "mutants.h"
#include "tile/tile.h"

namespace vsa::test {

template <class Element_, int D_, class Mutants = NoMutants>
struct Products {
  using Element = Element_;
  static constexpr int D = D_, kConsumers = 1;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads;
  static constexpr int kProducers = 1;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

  struct Params {
    TensorMap a, b, twice;  // [64, D]
    const float* columns;   // [64]
    float* out;             // [D / 64][16, 128, 4]: 64 x 64, accumulator order
  };
  struct SharedMemory {
    Tile<D> a, b;
    Tile<64> p;
    alignas(128) float sums[kTileRows * 64];
    alignas(128) float columns[64];
    Mbarrier full;
  };

  static VSA_DEVICE void init_barriers(SharedMemory& s) {
    if (Mutants::mutant != Mutant::BarrierNotInitialised) s.full.init(1, "full", 0);
    label(s.a, "a", 0);
    label(s.b, "b", 0);
    if (Mutants::mutant != Mutant::TileNotLabelled) label(s.p, "p", 0);
    label(s.sums, "sums", 0);
    label(s.columns, "columns", 0);
  }
  static VSA_DEVICE void prologue(const Params&, SharedMemory&, int, int) {}

  static VSA_DEVICE void produce(const Params& p, SharedMemory& s, int) {
    if (!elect_lane()) return;
    s.full.arrive_expect_tx(2 * kTileRows * D * 2 + 64 * 4);
    BoxCoordinates at = {};
    if (Mutants::mutant == Mutant::LoadBeforeTheTensor) at.w = -1;
    load_tile(s.a, p.a, at, s.full);
    load_tile(s.b, p.b, {}, s.full);
    bulk_load(s.columns, p.columns, 64 * 4, s.full);
  }

  static VSA_DEVICE void consume(const Params& p, SharedMemory& s, int) {
    Operand<D> a;
    Operand<64> weights;
    Fragment<64> product;
    Fragment<D> twice;
    s.full.wait(0);
    read_tile(a, s.a);
    mma_ABt<Element>(product, a, s.b);
    wgmma_commit();
    wgmma_wait<0>(product);
    map_columns(product, s.columns, [](float x, float by) { return x * by; });
    round_to<Element>(weights, product);
    write_tile(s.p, weights);
    fence_async_proxy();
    named_sync(1, Mutants::mutant == Mutant::LonelyMeeting ? kThreads : kWarpgroupThreads);

    mma_AB<Element>(twice, weights, s.b, false);
    mma_AB<Element>(twice, s.p, s.b);
    wgmma_commit();
    VSA_UNROLL
    for (int panel = 0; panel < D / 64; ++panel) {
      mma_AtB<Element>(product, s.p, s.b, panel, false);
      wgmma_commit();
      wgmma_wait<0>(product);
      if (Mutants::mutant != Mutant::StagingNotAwaited && elect_one()) bulk_wait_read<0>();
      if (Mutants::mutant != Mutant::StagingReused) named_sync(1, kWarpgroupThreads);
      write_raw(s.sums, product);
      fence_async_proxy();
      named_sync(1, kWarpgroupThreads);
      if (elect_one()) {
        bulk_reduce_add(p.out + panel * kTileRows * 64, s.sums, sizeof s.sums);
        bulk_commit();
      }
    }
    wgmma_wait<0>(twice);

    round_to<Element>(a, twice);
    write_tile(s.a, a);
    fence_async_proxy();
    named_sync(1, kWarpgroupThreads);
    if (elect_one()) {
      BoxCoordinates at = {};
      if (Mutants::mutant == Mutant::StoreBeforeTheTensor) at.w = -1;
      store_tile(p.twice, at, s.a);
      if (Mutants::mutant != Mutant::StoreNotCommitted) bulk_commit();
      bulk_wait<0>();
    }
  }
};

}  // namespace vsa::test
