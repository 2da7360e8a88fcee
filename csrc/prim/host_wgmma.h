// SPDX-License-Identifier: Apache-2.0
// Matrix products of the emulator. They are computed when they are waited for, the last moment that
// is legal; until then the accumulator holds NaN and whoever touches it is reported.
#pragma once
#include "prim/host_copies.h"
#include "prim/host_numbers.h"

namespace vsa {
namespace host {

// The read of an operand's bytes by the product that is being issued. own_rows: a warp reads the
// rows of A that it computes, so its own stores to those may follow its own wait
inline void touch_operand(uint32_t begin, uint32_t bytes, Layout layout, bool own_rows) {
  Agent& agent = *machine->current;
  const Event finished = agent.open_group(kProducts, agent.products.size());
  const Event met = agent.event(kProductsMet, finished.time);
  machine->ledger.touch({.begin = begin,
                         .end = begin + bytes,
                         .write = false,
                         .async = true,
                         .layout = layout,
                         .author = agent.name.c_str(),
                         .verb = "wgmma read of",
                         .finished = finished,
                         .own_met = own_rows ? Event{} : met,
                         .others_met = met},
                        agent.known);
}

// Bytes that an operand spans, panel by panel, after checking that the descriptor describes a part
// of one tile: 16 channels of all rows, or 16 rows of all channels.
inline void read_operand(uint64_t bits, bool transposed, int outer, bool is_a) {
  Machine& m = *machine;
  Agent& agent = *m.current;
  const DescriptorFields at = decode(bits);
  const Label* tile = m.ledger.label_at(at.start);
  const auto wrong = [&](const std::string& why) {
    throw Hazard("WRONG DESCRIPTOR: " + agent.name + ": wgmma read of " +
                 m.ledger.name_of(at.start) + ": " + why);
  };
  const auto apart = [&](const char* what, uint32_t wanted, uint32_t got) {
    wrong(std::string(what) + " are " + std::to_string(wanted) + " bytes apart, not " +
          std::to_string(got));
  };
  if (tile == nullptr) wrong("no labelled tile lies there");
  if (tile->begin % kSwizzleBytes != 0) wrong("the tile is not aligned to the swizzle");
  if (at.swizzle != kSwizzle128) wrong("its swizzle is not the 128-byte one");
  if (at.stride != kSwizzleBytes) apart("groups of eight rows", kSwizzleBytes, at.stride);
  const uint32_t offset = (at.start - tile->begin) % kPanelBytes;
  const uint32_t panel = at.start - offset;
  const int panels = ceil_div(outer, kTileRows);
  if (panel + panels * kPanelBytes > tile->end) wrong("it ends outside");
  if (transposed) {
    if (panels > 1 && at.leading != kPanelBytes) apart("panels", kPanelBytes, at.leading);
    if (offset % kSwizzleBytes != 0) wrong("it starts inside a group of eight rows");
    if (offset + kReduction * kRowBytes > kPanelBytes) wrong("it runs past row 63");
  } else {
    if (offset >= kRowBytes)
      wrong("it starts at row " + std::to_string(offset / kRowBytes) +
            ", though its rows are the outer axis");
    if (offset % (kReduction * 2) != 0) wrong("it starts between two steps of 16 channels");
  }
  for (int p = 0; p < panels; ++p)
    touch_operand(panel + p * kPanelBytes + (transposed ? offset : 0),
                  transposed ? kReduction * kRowBytes : kPanelBytes, Layout::Swizzled,
                  is_a && !transposed);
}

// An operand as floats, [16, outer].
template <class Element>
VSA_FAST void widen_operand(uint64_t bits, bool transposed, int outer, float* out) {
  const auto chunk = [&](int o, int k, float (&wide)[kChunkElements]) {
    uint16_t elements[kChunkElements];
    std::memcpy(elements, machine->smem + operand_address(bits, transposed, o, k), kChunkBytes);
    for (int i = 0; i < kChunkElements; ++i) wide[i] = widen(Element{}, elements[i]);
  };
  float wide[kChunkElements];
  if (transposed) {
    for (int k = 0; k < kReduction; ++k) {
      for (int o = 0; o < outer; o += kChunkElements) {
        chunk(o, k, wide);
        std::memcpy(out + k * outer + o, wide, sizeof wide);
      }
    }
  } else {
    for (int o = 0; o < outer; ++o) {
      for (int k = 0; k < kReduction; k += kChunkElements) {
        chunk(o, k, wide);
        for (int i = 0; i < kChunkElements; ++i) out[(k + i) * outer + o] = wide[i];
      }
    }
  }
}

// d [64, N] (+)= a [16, 64] transposed times b [16, N], in blocks of 4 x 8 that live in registers.
template <int N>
VSA_FAST void multiply(const float* a, const float* b, float* d, bool accumulate) {
  using Eight [[gnu::vector_size(32)]] = float;
  for (int row = 0; row < kTileRows; row += 4) {
    for (int column = 0; column < N; column += 8) {
      Eight sum[4] = {};
      for (int k = 0; k < kReduction; ++k) {
        Eight right;
        std::memcpy(&right, b + k * N + column, sizeof right);
        for (int r = 0; r < 4; ++r) sum[r] += a[k * kTileRows + row + r] * right;
      }
      for (int r = 0; r < 4; ++r) {
        float* at = d + (row + r) * N + column;
        Eight before = {};
        if (accumulate) std::memcpy(&before, at, sizeof before);
        sum[r] += before;
        std::memcpy(at, &sum[r], sizeof before);
      }
    }
  }
}

// d [64, columns] (+)= left [16, 64] transposed times the operand b
template <class Element>
void add_product(Accumulator<float>& d,
                 const float* left,
                 uint64_t b,
                 bool trans_b,
                 bool accumulate) {
  float right[kReduction * 2 * kTileRows];
  widen_operand<Element>(b, trans_b, d.columns, right);
  if (d.columns == 64)
    multiply<64>(left, right, d.values.data(), accumulate);
  else
    multiply<128>(left, right, d.values.data(), accumulate);
}

// The fragment's numbers move into its accumulator, and come back with its last product.
// add(accumulator): adds the product; borrowed: products that read its operand in registers
template <int N, class T, class Add>
void start_product(Fragment<N, T>& d, std::shared_ptr<int> borrowed, Add add) {
  Agent& agent = *machine->current;
  Accumulator<T>& sums = *d.accumulator;
  if (sums.products == 0) {
    d.residence.enter_product("an accumulator");
    sums.columns = N;
    sums.home = &d.x[0][0];
    sums.values.resize(kTileRows * N);
    sums.for_each_home([&](auto& x, int which, int element) {
      sums.values[element] = AccumulatorRegister<T>::get(x, which);
    });
    std::memset(d.x, 0xff, sizeof d.x);
  }
  ++sums.products;
  agent.open_products.push_back([d = d.accumulator, borrowed, add = std::move(add)] {
    add(*d);
    if (borrowed) --*borrowed;
    if (--d->products == 0 && d->home != nullptr)
      d->for_each_home([&](auto& x, int which, int element) {
        AccumulatorRegister<T>::set(x, which, d->values[element]);
      });
  });
  machine->preempt();
}

// An operand in registers, from now until its product has been waited for.
template <class Registers>
std::shared_ptr<int> borrow(const Registers& a) {
  a.residence.enter_product("an operand");
  ++*a.borrowed;
  return a.borrowed;
}

}  // namespace host

inline void wgmma_fence() {
  ++host::whole_warpgroup("wgmma_fence").wgmma_fences;
  host::machine->preempt();
}

inline void wgmma_commit() {
  host::Agent& agent = host::whole_warpgroup("wgmma_commit");
  agent.products.push_back(std::move(agent.open_products));
  agent.open_products.clear();
  host::machine->preempt();
}

template <class Element, bool TransA, bool TransB, int N>
void wgmma(Fragment<N>& d, uint64_t a, uint64_t b, bool accumulate) {
  static_assert(N == 64 || N == 128, "products are 64 or 128 columns wide");
  host::read_operand(a, TransA, kTileRows, true);
  host::read_operand(b, TransB, N, false);
  host::start_product(d, {}, [=](host::Accumulator<float>& sums) {
    float left[kReduction * kTileRows];
    host::widen_operand<Element>(a, TransA, kTileRows, left);
    host::add_product<Element>(sums, left, b, TransB, accumulate);
  });
}

template <class Element, bool TransB, int N, int K>
void wgmma(Fragment<N>& d, const Operand<K>& a, int k16, uint64_t b, bool accumulate) {
  static_assert(N == 64 || N == 128, "products are 64 or 128 columns wide");
  host::read_operand(b, TransB, N, false);
  const std::shared_ptr<int> borrowed = host::borrow(a);
  std::vector<float> left(kReduction * kTileRows);
  for (int t = 0; t < kWarpgroupThreads; ++t) {
    for (int r = 0; r < 4; ++r) {
      const uint32_t pair = a.x[t][4 * k16 + r];
      float* at = &left[pair_column(t, r) * kTileRows + pair_row(t, r)];
      at[0] = host::widen(Element{}, static_cast<uint16_t>(pair));
      at[kTileRows] = host::widen(Element{}, static_cast<uint16_t>(pair >> 16));
    }
  }
  host::start_product(d, borrowed, [=, left = std::move(left)](host::Accumulator<float>& sums) {
    host::add_product<Element>(sums, left.data(), b, TransB, accumulate);
  });
}

template <int Pending, class... Fragments>
void wgmma_wait(Fragments&... finished) {
  host::Agent& agent = host::whole_warpgroup("wgmma_wait");
  host::machine->preempt();
  while (agent.products.size() > Pending) {
    for (const host::Product& product : agent.products.front()) product();
    agent.products.pop_front();
    agent.advance(host::kProducts);
  }
  if ((finished.in_flight() || ...))
    throw host::Hazard("WGMMA STILL IN FLIGHT: " + agent.name + " takes wgmma_wait<" +
                       std::to_string(Pending) + "> to have finished it");
}

}  // namespace vsa
