// SPDX-License-Identifier: Apache-2.0
// Shared memory through ordinary loads and stores, and barriers, in the emulator.
#pragma once
#include "prim/host_registers.h"

namespace vsa {
namespace host {

// An ordinary load or store by the running agent.
inline void touch_generic(const void* p, int bytes, bool write, Layout layout) {
  Machine& m = *machine;
  Agent& agent = *m.current;
  agent.advance(kTouches);
  const uint32_t begin = m.address(p);
  const int time = agent.time(kTouches);
  m.ledger.touch({.begin = begin,
                  .end = begin + static_cast<uint32_t>(bytes),
                  .write = write,
                  .async = false,
                  .layout = layout,
                  .author = agent.name.c_str(),
                  .verb = write ? "store to" : "load from",
                  .finished = agent.event(kTouches, time),
                  .fenced = agent.event(kFences, time),
                  .own_met = agent.event(kFencesMet, time),
                  .others_met = agent.elected ? Event{} : agent.event(kTouchesMet, time)},
                 agent.known);
  m.preempt();
}

// A phase completes when all have arrived and all bytes have come.
inline void settle(BarrierState& barrier) {
  if (barrier.pending > 0 || barrier.bytes > 0) return;
  if (barrier.bytes < 0 || barrier.copies > 0)
    throw Hazard("WRONG EXPECT_TX: " + barrier.name + " use " + std::to_string(barrier.completed) +
                 " expects fewer bytes than its copies bring");
  ++barrier.completed;
  barrier.pending = barrier.arrivals;
  barrier.collected.upto[barrier.clock] = barrier.completed;
  barrier.published.merge(barrier.collected);
}

}  // namespace host

inline uint32_t smem_address(const void* p) { return host::machine->address(p); }
inline uint32_t* smem_words(uint32_t address) {
  return reinterpret_cast<uint32_t*>(host::machine->smem + address);
}
inline void note_write(const void* p, int bytes, Layout layout = Layout::Linear) {
  host::touch_generic(p, bytes, true, layout);
}
inline void note_read(const void* p, int bytes, Layout layout = Layout::Linear) {
  host::touch_generic(p, bytes, false, layout);
}

template <class T>
void label(const T& object, const char* name, int index) {
  const uint32_t begin = smem_address(&object);
  host::machine->ledger.add_label({begin, begin + static_cast<uint32_t>(sizeof(T)),
                                   std::string(name) + "[" + std::to_string(index) + "]"});
}

inline void store_panel(uint32_t panel, const Operand<64>& a) {
  host::whole_warpgroup("store_panel");
  VSA_EACH_LANE(t) {
    const auto& pairs = lane(a, t);
    for (int r = 0; r < 16; ++r)
      *smem_words(swizzle128(panel + pair_row(t, r) * kRowBytes +
                             pair_column(t, r) * kElementBytes)) = pairs[r];
  }
}
inline void fence_async_proxy() {
  host::Agent& agent = *host::machine->current;
  agent.set_time(host::kFences, agent.time(host::kTouches));
  host::machine->preempt();
}

// As large as the hardware's, so that a block's shared memory is as large as there.
struct Mbarrier {
  uint64_t word;  // which barrier of the machine this is, or NaN bytes

  void init(int arrivals, const char* name, int index) {
    host::Machine& m = *host::machine;
    word = m.barriers.size();
    if (word >= host::kMaxBarriers) throw host::Hazard("too many mbarriers: raise kMaxBarriers");
    const int clock = host::kMaxAgents * host::kClocksPerAgent + static_cast<int>(word);
    m.barriers.emplace_back(std::string(name) + "[" + std::to_string(index) + "]", clock, arrivals);
  }
  void arrive_all() { arrive_together(kWarpgroupThreads, "arrive_all"); }
  void arrive_warp() { arrive_together(kWarpThreads, "arrive_warp"); }
  void arrive_one(int times = 1) { arrive(times, 0, host::one_thread("arrive_one").known); }
  void arrive_expect_tx(int bytes) { arrive(1, bytes, host::one_thread("arrive_expect_tx").known); }

  void wait(int use) {
    host::BarrierState& barrier = state();
    struct Phase : host::Wait {
      Phase(const host::BarrierState& barrier, int use) : barrier(barrier), use(use) {}
      const host::BarrierState& barrier;
      const int use;
      // What the hardware can tell: a phase of this parity is not the one in progress.
      bool over() const override { return ((barrier.completed ^ use) & 1) != 0; }
      std::string name() const override {
        return barrier.name + " use " + std::to_string(use) + " (" +
               std::to_string(barrier.completed) + " completed, " +
               std::to_string(barrier.pending) + " of " + std::to_string(barrier.arrivals) +
               " arrivals missing)";
      }
    };
    reject_alias(barrier.completed > use + 1, use);
    host::machine->block_until(Phase(barrier, use));
    meet(use);
  }
  void wait_asleep(int use) { wait(use); }
  bool is_over(int use) {
    reject_alias(state().completed > use + 1, use);
    if (((state().completed ^ use) & 1) == 0) return false;
    meet(use);
    return true;
  }
  bool is_over(int use, bool wanted) { return wanted && is_over(use); }

  host::BarrierState& state() const {
    if (word >= host::machine->barriers.size())
      throw host::Hazard("MBARRIER NOT INITIALISED: used by " + host::machine->current->name);
    return host::machine->barriers[word];
  }

 private:
  void reject_alias(bool aliased, int use) const {
    if (!aliased) return;
    throw host::Hazard("PHASE ALIAS: " + host::machine->current->name + " waits for " +
                       state().name + " use " + std::to_string(use) + " when " +
                       std::to_string(state().completed) + " uses have completed");
  }
  // What others did before the phase was over is known from now on.
  void meet(int use) const {
    const host::BarrierState& barrier = state();
    reject_alias(barrier.completed != use + 1, use);
    host::Agent& agent = *host::machine->current;
    agent.known.merge(barrier.published);
    // What one thread told the barrier comes back to all of them.
    const int stores = barrier.published.upto[agent.clock(host::kStores)];
    agent.set_time(host::kStoresMet, std::max(agent.time(host::kStoresMet), stores));
  }
  // Every thread answers for its own part.
  void arrive_together(int threads, const char* primitive) {
    host::Agent& agent = host::whole_warpgroup(primitive);
    host::Knowledge told = agent.known;
    told.upto[agent.clock(host::kTouchesMet)] = agent.time(host::kTouches);
    told.upto[agent.clock(host::kProductsMet)] = agent.time(host::kProducts);
    arrive(threads, 0, told);
  }
  void arrive(int arrivals, int bytes, const host::Knowledge& told) {
    host::BarrierState& barrier = state();
    barrier.collected.merge(told);
    barrier.bytes += bytes;
    barrier.pending -= arrivals;
    if (barrier.pending < 0)
      throw host::Hazard("TOO MANY ARRIVALS on " + barrier.name + " use " +
                         std::to_string(barrier.completed) + ", the last by " +
                         host::machine->current->name);
    host::settle(barrier);
    host::machine->preempt();
  }
};

static_assert(sizeof(Mbarrier) == 8, "an mbarrier is 8 bytes on the hardware");

inline void named_sync(int id, int threads) {
  using host::machine;
  host::Agent& agent = host::whole_warpgroup("named_sync");
  if (id < 1 || id > 15 || threads % kWarpThreads != 0)
    throw host::Hazard("NAMED BARRIER " + std::to_string(id) + " is not one of 1 to 15, or " +
                       std::to_string(threads) + " threads are not whole warps");
  host::NamedBarrier& barrier = machine->named[id];
  if (barrier.arrived > 0 && barrier.threads != threads)
    throw host::Hazard("NAMED BARRIER " + std::to_string(id) + ": " + agent.name + " expects " +
                       std::to_string(threads) + " threads, others expect " +
                       std::to_string(barrier.threads));
  struct Meeting : host::Wait {
    Meeting(const host::NamedBarrier& barrier, int id)
        : barrier(barrier), id(id), generation(barrier.generation) {}
    const host::NamedBarrier& barrier;
    const int id, generation;
    bool over() const override { return barrier.generation != generation; }
    std::string name() const override {
      return "named barrier " + std::to_string(id) + " (" + std::to_string(barrier.arrived) +
             " of " + std::to_string(barrier.threads) + " threads are there)";
    }
  };
  const Meeting meeting(barrier, id);
  barrier.threads = threads;
  barrier.arrived += kWarpgroupThreads;
  barrier.collected.merge(agent.known);
  if (barrier.arrived >= threads) {
    barrier.arrived = 0;
    ++barrier.generation;
    barrier.published = barrier.collected;
  }
  machine->block_until(meeting);
  agent.known.merge(barrier.published);
  agent.set_time(host::kTouchesMet, agent.time(host::kTouches));
  agent.set_time(host::kFencesMet, agent.time(host::kFences));
  agent.set_time(host::kStoresMet, agent.time(host::kStores));
  agent.set_time(host::kProductsMet, agent.time(host::kProducts));
}

}  // namespace vsa
