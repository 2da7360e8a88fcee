// SPDX-License-Identifier: Apache-2.0
// Copies by the emulated TMA engine: issued at once, done when the schedule says so, in any order.
#pragma once
#include "prim/host_barriers.h"

namespace vsa {

// What cuTensorMapEncodeTiled would be told, with 16-bit elements and zeros out of bounds. As large
// as the hardware's, so that parameters look the same on both machines.
struct alignas(64) TensorMap {
  void* base;
  uint64_t dims[5];              // elements: channel, w, h, t, outer
  uint64_t strides[4];           // bytes: w, h, t, outer
  uint32_t box[5];               // elements
  uint32_t swizzle = kRowBytes;  // bytes; 0 for none
};
static_assert(sizeof(TensorMap) == 128, "a tensor map is 128 bytes on the hardware");

namespace host {

inline uint32_t box_rows(const TensorMap& map) {
  return map.box[1] * map.box[2] * map.box[3] * map.box[4];
}
inline uint32_t box_bytes(const TensorMap& map) { return box_rows(map) * map.box[0] * 2; }
inline Layout layout_of(const TensorMap& map) {
  return map.swizzle == kRowBytes ? Layout::Swizzled : Layout::Linear;
}

// Rules that the driver or the hardware would enforce, or silently break.
inline void check_copy(const TensorMap& map, uint32_t panel) {
  const auto require = [](bool holds, const char* rule) {
    if (!holds) throw Hazard("BAD TENSOR MAP: " + machine->current->name + ": " + rule);
  };
  require(reinterpret_cast<uintptr_t>(map.base) % 16 == 0, "its base is not 16-byte aligned");
  for (uint64_t stride : map.strides) require(stride % 16 == 0, "a stride is no multiple of 16");
  for (int axis = 0; axis < 5; ++axis)
    require(map.box[axis] >= 1 && map.box[axis] <= 256, "a box has 1 to 256 elements per axis");
  require(map.box[0] * 2 <= kRowBytes, "a row of the box is wider than the swizzle");
  require(map.box[0] * 2 % 16 == 0, "a row of the box is no multiple of 16 bytes");
  require(panel % (map.swizzle != 0 ? kSwizzleBytes : 128) == 0, "the panel is not aligned");
}

// fn(row of the box, its elements in global memory or null, how many of them are in bounds)
template <class Fn>
void for_each_box_row(const TensorMap& map, BoxCoordinates at, Fn fn) {
  const int64_t first[5] = {at.channel, at.w, at.h, at.t, at.outer};
  const int64_t channels =
      std::clamp<int64_t>(static_cast<int64_t>(map.dims[0]) - first[0], 0, map.box[0]);
  uint32_t row = 0;
  uint32_t i[5] = {};
  for (i[4] = 0; i[4] < map.box[4]; ++i[4])
    for (i[3] = 0; i[3] < map.box[3]; ++i[3])
      for (i[2] = 0; i[2] < map.box[2]; ++i[2])
        for (i[1] = 0; i[1] < map.box[1]; ++i[1], ++row) {
          bool inside = first[0] >= 0 && channels > 0;
          auto* place = static_cast<unsigned char*>(map.base) + first[0] * 2;
          for (int axis = 1; axis < 5; ++axis) {
            const int64_t x = first[axis] + i[axis];
            inside = inside && x >= 0 && x < static_cast<int64_t>(map.dims[axis]);
            place += x * static_cast<int64_t>(map.strides[axis - 1]);
          }
          fn(static_cast<int>(row), inside ? place : nullptr, static_cast<int>(channels));
        }
}

// Where chunk `chunk` of a row lies in a panel.
inline unsigned char* chunk_at(const TensorMap& map, uint32_t panel, int row, int chunk) {
  const uint32_t address = panel + row * map.box[0] * 2 + chunk * kChunkBytes;
  return machine->smem + (map.swizzle != 0 ? swizzle128(address) : address);
}

// Until `copy` has run and told `barrier`, no one may touch the destination.
inline void start_load(Mbarrier& barrier,
                       uint32_t to,
                       uint32_t bytes,
                       Layout layout,
                       const char* verb,
                       std::function<void()> copy) {
  Machine& m = *machine;
  Agent& agent = one_thread(verb);
  BarrierState& state = barrier.state();
  const Event finished = {state.clock, state.completed + 1};
  m.ledger.touch({.begin = to,
                  .end = to + bytes,
                  .write = true,
                  .async = true,
                  .layout = layout,
                  .author = agent.name.c_str(),
                  .verb = verb,
                  .finished = finished},
                 agent.known);
  std::memset(m.smem + to, 0xff, bytes);
  ++state.copies;
  state.last_load = finished.time;
  m.copies.push_back([&state, bytes, known = agent.known, copy = std::move(copy)] {
    copy();
    --state.copies;
    state.bytes -= bytes;
    state.collected.merge(known);
    settle(state);
  });
  m.preempt();
}

// `read` copies shared memory aside, `write` puts that into global memory, later.
inline void start_store(const void* from,
                        uint32_t bytes,
                        Layout layout,
                        const char* verb,
                        std::function<void(std::vector<unsigned char>&)> read,
                        std::function<void(const std::vector<unsigned char>&)> write) {
  Machine& m = *machine;
  Agent& agent = one_thread(verb);
  const uint32_t begin = m.address(from);
  const Event finished = agent.open_group(kStores, agent.stores_to_read.size());
  m.ledger.touch({.begin = begin,
                  .end = begin + bytes,
                  .write = false,
                  .async = true,
                  .layout = layout,
                  .author = agent.name.c_str(),
                  .verb = verb,
                  .finished = finished,
                  .own_met = agent.event(kStoresMet, finished.time)},
                 agent.known);
  const auto group = agent.open_stores;
  ++group->stores;
  ++group->reads;
  ++group->writes;
  m.copies.push_back([&m, group, read = std::move(read), write = std::move(write)] {
    auto data = std::make_shared<std::vector<unsigned char>>();
    read(*data);
    --group->reads;
    m.copies.push_back([group, data, write] {
      write(*data);
      --group->writes;
    });
  });
  m.preempt();
}

inline void wait_for_stores(int StoreGroup::* left, const StoreGroup& group) {
  struct Done : Wait {
    Done(int StoreGroup::* left, const StoreGroup& group) : left(left), group(group) {}
    int StoreGroup::* const left;
    const StoreGroup& group;
    bool over() const override { return group.*left == 0; }
    std::string name() const override { return "its stores"; }
  };
  machine->block_until(Done(left, group));
}

}  // namespace host

inline void prefetch_map(const TensorMap&) {}

inline void tma_load_panel(void* panel,
                           const TensorMap& map,
                           BoxCoordinates at,
                           Mbarrier& barrier,
                           CacheHint = CacheHint::Normal) {
  const uint32_t to = smem_address(panel);
  host::check_copy(map, to);
  const int begins[] = {at.channel, at.w, at.h, at.t, at.outer};
  for (int axis = 0; axis < 5; ++axis)
    if (begins[axis] < 0 || static_cast<uint64_t>(begins[axis]) >= map.dims[axis])
      throw host::Hazard("BAD COPY: " + host::machine->current->name +
                         ": a TMA load's box begins out of bounds");
  host::start_load(
      barrier, to, host::box_bytes(map), host::layout_of(map), "TMA load into", [to, &map, at] {
        host::for_each_box_row(map, at, [&](int row, const unsigned char* from, int channels) {
          unsigned char elements[kRowBytes] = {};
          if (from != nullptr) std::memcpy(elements, from, channels * 2);
          for (uint32_t chunk = 0; chunk < map.box[0] / kChunkElements; ++chunk)
            std::memcpy(host::chunk_at(map, to, row, chunk), elements + chunk * kChunkBytes,
                        kChunkBytes);
        });
      });
}

inline void tma_store_panel(const TensorMap& map, BoxCoordinates at, const void* panel) {
  const uint32_t from = smem_address(panel);
  host::check_copy(map, from);
  if (at.channel < 0 || at.w < 0 || at.h < 0 || at.t < 0 || at.outer < 0)
    throw host::Hazard("BAD COPY: " + host::machine->current->name +
                       ": a TMA store's box begins at a negative coordinate");
  const auto read = [&map, from](std::vector<unsigned char>& rows) {
    rows.resize(host::box_bytes(map));
    unsigned char* next = rows.data();
    for (uint32_t row = 0; row < host::box_rows(map); ++row)
      for (uint32_t chunk = 0; chunk < map.box[0] / kChunkElements; ++chunk, next += kChunkBytes)
        std::memcpy(next, host::chunk_at(map, from, row, chunk), kChunkBytes);
  };
  const auto write = [&map, at](const std::vector<unsigned char>& rows) {
    host::for_each_box_row(map, at, [&](int row, unsigned char* to, int channels) {
      if (to != nullptr) std::memcpy(to, rows.data() + row * map.box[0] * 2, channels * 2);
    });
  };
  host::start_store(panel, host::box_bytes(map), host::layout_of(map), "TMA store from", read,
                    write);
}

inline void bulk_load(void* to,
                      const void* from,
                      int bytes,
                      Mbarrier& barrier,
                      Layout layout = Layout::Linear) {
  const uint32_t begin = smem_address(to);
  if ((begin | reinterpret_cast<uintptr_t>(from) | bytes) % 16 != 0)
    throw host::Hazard("BAD COPY: bulk_load moves aligned granules of 16 bytes");
  host::start_load(barrier, begin, bytes, layout, "bulk load into",
                   [=] { std::memcpy(to, from, bytes); });
}

inline void bulk_reduce_add(float* to, const float* from, int bytes) {
  if ((reinterpret_cast<uintptr_t>(to) | smem_address(from) | bytes) % 16 != 0)
    throw host::Hazard("BAD COPY: bulk_reduce_add moves aligned granules of 16 bytes");
  const auto read = [=](std::vector<unsigned char>& terms) {
    terms.resize(bytes);
    std::memcpy(terms.data(), from, bytes);
  };
  const auto write = [=](const std::vector<unsigned char>& terms) {
    for (int i = 0; i < bytes / 4; ++i) {
      float term;
      std::memcpy(&term, terms.data() + i * 4, 4);
      to[i] += term;
    }
  };
  host::start_store(from, bytes, Layout::Linear, "bulk reduce from", read, write);
}

inline void bulk_commit() {
  host::Agent& agent = host::one_thread("bulk_commit");
  agent.stores_to_read.push_back(agent.open_stores);
  agent.stores_to_write.push_back(agent.open_stores);
  agent.open_stores = std::make_shared<host::StoreGroup>();
}

template <int Pending>
void bulk_wait_read() {
  host::Agent& agent = *host::machine->current;
  while (agent.stores_to_read.size() > Pending) {
    host::wait_for_stores(&host::StoreGroup::reads, *agent.stores_to_read.front());
    agent.stores_to_read.pop_front();
    agent.advance(host::kStores);
  }
}

template <int Pending>
void bulk_wait() {
  bulk_wait_read<Pending>();
  host::Agent& agent = *host::machine->current;
  while (agent.stores_to_write.size() > Pending) {
    host::wait_for_stores(&host::StoreGroup::writes, *agent.stores_to_write.front());
    agent.stores_to_write.pop_front();
  }
}

}  // namespace vsa
