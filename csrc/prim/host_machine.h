// SPDX-License-Identifier: Apache-2.0
// The emulated multiprocessor: one agent per warpgroup, each on a stack of its own, and one block's
// shared memory. Every primitive is a point where another agent may go on; who does, and when
// copies happen, is drawn from a seed.
#pragma once
#include <ucontext.h>

#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "prim/host_ledger.h"

namespace vsa::host {

// What an agent waits for. Lives on the agent's stack while it does.
struct Wait {
  virtual bool over() const = 0;
  virtual std::string name() const = 0;

 protected:
  ~Wait() = default;
};

// One wgmma: it computes when it is waited for.
using Product = std::function<void()>;

// Stores that were committed together. Shared memory is read first, global memory written later.
struct StoreGroup {
  int stores = 0;             // issued
  int reads = 0, writes = 0;  // still to be done
};

struct Agent {
  std::string name;
  int index = 0;
  std::function<void()> body;
  std::unique_ptr<char[]> stack;
  ucontext_t context{};
  const Wait* waiting = nullptr;
  bool started = false, done = false;

  Knowledge known;
  int first_lane = 0, last_lane = kWarpgroupThreads;  // narrower inside if_any_row
  bool elected = false;  // has asked elect_one, and done nothing together since
  int wgmma_fences = 0;
  std::vector<Product> open_products;
  std::deque<std::vector<Product>> products;  // committed groups, oldest first
  std::shared_ptr<StoreGroup> open_stores = std::make_shared<StoreGroup>();
  std::deque<std::shared_ptr<StoreGroup>> stores_to_read, stores_to_write;

  int clock(AgentClock which) const { return index * kClocksPerAgent + which; }
  int time(AgentClock which) const { return known.upto[clock(which)]; }
  void set_time(AgentClock which, int time) { known.upto[clock(which)] = time; }
  void advance(AgentClock which) { ++known.upto[clock(which)]; }
  Event event(AgentClock which, int time) const { return {clock(which), time}; }
  // Groups retire in order; the open one comes after those that were committed.
  Event open_group(AgentClock which, size_t committed) const {
    return event(which, time(which) + static_cast<int>(committed) + 1);
  }
};

struct BarrierState {
  BarrierState(std::string name, int clock, int arrivals)
      : name(std::move(name)), clock(clock), arrivals(arrivals), pending(arrivals) {}

  std::string name;
  int clock;     // of Knowledge: completed phases
  int arrivals;  // that complete a phase
  int pending;
  int completed = 0;
  int64_t bytes = 0;    // expected and not yet arrived
  int copies = 0;       // on their way
  int last_load = 0;    // phase that the last copy belongs to, from 1
  Knowledge collected;  // what those who arrived know
  Knowledge published;  // what those who waited may rely on
};

struct NamedBarrier {
  int threads = 0, arrived = 0, generation = 0;
  Knowledge collected, published;
};

class Machine {
 public:
  Machine(int block, int blocks, unsigned seed) : block(block), blocks(blocks), rng_(seed) {
    constexpr unsigned kHaste[] = {0, 6, 1};  // copies come late, early, or any time
    constexpr unsigned kPatience[] = {1, 16, 128};
    haste_ = kHaste[seed % 3];
    patience_ = kPatience[seed / 3 % 3];
    std::memset(smem, 0xff, sizeof smem);  // NaN: what is read before it is written shows
    add_agent("prologue", {});
    current = agents_[0].get();
    current->started = current->done = true;
  }

  const int block, blocks;
  int tiles_taken = 0;                           // that the block has taken
  alignas(1024) unsigned char smem[256 * 1024];  // descriptors reach further than a block's share
  Ledger ledger;
  Agent* current;
  std::deque<BarrierState> barriers;
  NamedBarrier named[16];
  std::vector<std::function<void()>> copies;  // issued, and not yet done

  uint32_t address(const void* p) const {
    const auto offset = static_cast<const unsigned char*>(p) - smem;
    if (offset < 0 || offset >= static_cast<std::ptrdiff_t>(sizeof smem))
      throw Hazard("NOT SHARED MEMORY: " + current->name + " uses another pointer as if it were");
    return static_cast<uint32_t>(offset);
  }

  // Whatever the prologue did is finished, and known to all: __syncthreads.
  void add_agent(std::string name, std::function<void()> body) {
    auto agent = std::make_unique<Agent>();
    agent->name = std::move(name);
    agent->index = static_cast<int>(agents_.size());
    agent->body = std::move(body);
    if (agent->index >= kMaxAgents) throw Hazard("too many agents: raise kMaxAgents");
    if (!agents_.empty()) {
      Agent& prologue = *agents_[0];
      prologue.set_time(kTouchesMet, prologue.time(kTouches));
      agent->known = prologue.known;
    }
    agents_.push_back(std::move(agent));
  }

  void run();  // all agents to their end; throws the first Hazard

  void preempt() {
    if (in_prologue()) return;
    yield();
  }
  void block_until(const Wait& wait) {
    if (in_prologue()) {
      if (!wait.over()) throw Hazard("DEADLOCK: [prologue waits for " + wait.name() + "]");
      return;
    }
    current->waiting = &wait;
    yield();
    current->waiting = nullptr;
  }
  // For destructors, which must not throw: the run ends at the next primitive.
  void fail_soon(const std::string& what) {
    if (!failure_) failure_ = std::make_exception_ptr(Hazard(what));
  }
  // A block that ends while something is still under way.
  void check_end() const;

 private:
  struct Cancelled {};  // unwinds the agents that are left when one has failed

  bool in_prologue() const { return current == agents_[0].get(); }
  void yield();
  Agent* pick();  // who goes on
  bool copies_hurry() { return !copies.empty() && rng_() % 8 < haste_; }
  void do_a_copy();
  std::string deadlock() const;
  void live(Agent& agent);  // an agent's whole life
  static void enter(unsigned high, unsigned low);
  void prepare(Agent& agent);  // a stack for its life, which has not begun

  std::vector<std::unique_ptr<Agent>> agents_;
  std::vector<Agent*> able_;
  ucontext_t main_{};
  std::exception_ptr failure_;
  bool cancelling_ = false;
  std::mt19937 rng_;
  unsigned haste_;     // chance in 8 that a copy goes first; 0: not before everyone waits
  unsigned patience_;  // primitives that an agent gets done in a row, on average
};

// The machine that this thread runs.
inline constinit thread_local Machine* machine = nullptr;

inline void Machine::do_a_copy() {
  const size_t i = rng_() % copies.size();
  const auto copy = std::move(copies[i]);
  copies.erase(copies.begin() + static_cast<std::ptrdiff_t>(i));
  copy();
}

inline Agent* Machine::pick() {
  while (true) {
    if (copies_hurry()) {
      do_a_copy();
      continue;
    }
    const auto able = [](const Agent& agent) {
      return !agent.done && (agent.waiting == nullptr || agent.waiting->over());
    };
    if (patience_ > 1 && able(*current) && rng_() % patience_ != 0) return current;
    able_.clear();
    for (const auto& agent : agents_)
      if (able(*agent)) able_.push_back(agent.get());
    if (!able_.empty()) return able_[rng_() % able_.size()];
    if (copies.empty()) throw Hazard(deadlock());
    do_a_copy();
  }
}

inline void Machine::yield() {
  if (failure_) throw Cancelled{};
  Agent* me = current;
  Agent* next = pick();
  if (next == me) return;
  current = next;
  swapcontext(&me->context, &next->context);
  if (cancelling_) throw Cancelled{};
}

inline void Machine::live(Agent& agent) {
  agent.started = true;
  try {
    agent.body();
    if (!agent.open_products.empty() || !agent.products.empty())
      throw Hazard("WGMMA STILL IN FLIGHT at the end of " + agent.name);
    if (agent.open_stores->stores > 0)
      throw Hazard("STORES NEVER COMMITTED at the end of " + agent.name);
    if (!agent.stores_to_read.empty())
      throw Hazard("STORES STILL IN FLIGHT at the end of " + agent.name +
                   ": its shared memory would be gone");
  } catch (const Cancelled&) {
  } catch (...) {
    if (!failure_) failure_ = std::current_exception();
  }
  agent.done = true;
  bool others = false;
  for (const auto& other : agents_) others |= !other->done;
  Agent* next = nullptr;
  if (others && !failure_) {
    try {
      next = pick();
    } catch (...) {
      failure_ = std::current_exception();
    }
  }
  if (next == nullptr) {
    setcontext(&main_);
  } else {
    current = next;
    setcontext(&next->context);
  }
}

inline void Machine::enter(unsigned high, unsigned low) {
  const auto bits = uint64_t{high} << 32 | low;
  machine->live(*reinterpret_cast<Agent*>(static_cast<uintptr_t>(bits)));
}

inline void Machine::prepare(Agent& agent) {
  constexpr size_t kStackBytes = 2 << 20;
  agent.stack = std::make_unique_for_overwrite<char[]>(kStackBytes);
  getcontext(&agent.context);
  agent.context.uc_stack.ss_sp = agent.stack.get();
  agent.context.uc_stack.ss_size = kStackBytes;
  agent.context.uc_link = &main_;
  const uint64_t bits = reinterpret_cast<uintptr_t>(&agent);
  makecontext(&agent.context, reinterpret_cast<void (*)()>(enter), 2,
              static_cast<unsigned>(bits >> 32), static_cast<unsigned>(bits));
}

inline void Machine::run() {
  for (const auto& agent : agents_)
    if (!agent->done) prepare(*agent);
  current = pick();
  swapcontext(&main_, &current->context);
  cancelling_ = true;
  for (const auto& agent : agents_) {
    if (!agent->started || agent->done) continue;
    current = agent.get();
    swapcontext(&main_, &current->context);
  }
  if (failure_) std::rethrow_exception(failure_);
  while (!copies.empty()) do_a_copy();
  check_end();
}

inline void Machine::check_end() const {
  Knowledge all;
  for (const auto& agent : agents_) all.merge(agent->known);
  for (const BarrierState& barrier : barriers) {
    const std::string where = barrier.name + " at the end of the block";
    if (barrier.bytes != 0)
      throw Hazard("WRONG EXPECT_TX: " + std::to_string(barrier.bytes) + " bytes are left on " +
                   where);
    if (all.upto[barrier.clock] < barrier.last_load)
      throw Hazard("LOADS STILL IN FLIGHT: nobody has waited for use " +
                   std::to_string(barrier.last_load - 1) + " of " + where);
  }
}

inline std::string Machine::deadlock() const {
  std::string text;
  for (const BarrierState& barrier : barriers)
    if (barrier.bytes > 0 && barrier.copies == 0)
      text += "WRONG EXPECT_TX: " + barrier.name + " use " + std::to_string(barrier.completed) +
              " still expects " + std::to_string(barrier.bytes) + " bytes that no copy brings; ";
  text += "DEADLOCK:";
  for (const auto& agent : agents_)
    if (!agent->done) text += " [" + agent->name + " waits for " + agent->waiting->name() + "]";
  return text;
}

}  // namespace vsa::host
