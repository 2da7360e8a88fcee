// SPDX-License-Identifier: Apache-2.0
// Registers of a warpgroup in the emulator: all 128 lanes, each with the elements that the hardware
// would give it.
#pragma once
#include <memory>

#include "prim/host_machine.h"
#include "prim/host_numbers8.h"

// Inside if_any_row only a warp's lanes are active.
#define VSA_EACH_LANE(t)                                  \
  for (int t = ::vsa::host::machine->current->first_lane; \
       t < ::vsa::host::machine->current->last_lane; ++t)

namespace vsa {
namespace host {

// Some primitives take all threads of the warpgroup.
inline Agent& whole_warpgroup(const char* primitive) {
  Agent& agent = *machine->current;
  if (agent.first_lane != 0 || agent.last_lane != kWarpgroupThreads)
    throw Hazard(std::string("DIVERGED: ") + primitive + " by one warp of " + agent.name);
  agent.elected = false;
  return agent;
}

// Others are for the one thread that elect_one picks, and would happen 128 times without it.
inline Agent& one_thread(const char* primitive) {
  Agent& agent = *machine->current;
  if (!agent.elected)
    throw Hazard("NOT ELECTED: " + agent.name + ": \"" + primitive + "\" by all threads, not one");
  return agent;
}

// Touching registers of a product in flight is undefined; touching them at all asks for a
// wgmma_fence before the next product.
class Residence {
 public:
  void touch(bool in_flight, const char* what) const {
    const Agent& agent = *machine->current;
    if (in_flight)
      throw Hazard(std::string("FRAGMENT IN FLIGHT: ") + agent.name + " touches " + what +
                   " before wgmma_wait");
    touched_after_ = agent.wgmma_fences;
  }
  void enter_product(const char* what) const {
    const Agent& agent = whole_warpgroup("wgmma");
    if (touched_after_ >= agent.wgmma_fences)
      throw Hazard(std::string("MISSING WGMMA FENCE: ") + agent.name + " has touched " + what +
                   " since the last one");
  }
  static void check_gone(bool in_flight, const char* what) {
    if (in_flight && std::uncaught_exceptions() == 0)
      machine->fail_soon(std::string("FRAGMENT IN FLIGHT: ") + machine->current->name +
                         " lets go of " + what + " before wgmma_wait");
  }

 private:
  mutable int touched_after_ = 0;  // wgmma fences that the agent had executed
};

// What a thread keeps of an accumulator in one register: a float or an int, or a pair of halves.
template <class T>
struct AccumulatorRegister {
  using Register = T;
  using Number = T;  // what is summed
  static constexpr int kNumbers = 1;

  static T get(Register x, int) { return x; }
  static void set(Register& x, int, T number) { x = number; }
};
template <>
struct AccumulatorRegister<Fp16> {
  using Register = uint32_t;
  using Number = float;
  static constexpr int kNumbers = 2;

  static float get(Register x, int which) {
    return widen(Fp16{}, static_cast<uint16_t>(x >> 16 * which));
  }
  static void set(Register& x, int which, float number) {
    x = (x & ~(0xffffu << 16 * which)) | uint32_t{narrow(Fp16{}, number)} << 16 * which;
  }
};

// An accumulator that products are still being added to: row-major, while its fragment holds NaN.
template <class T>
struct Accumulator {
  using In = AccumulatorRegister<T>;

  std::vector<typename In::Number> values;  // [64, columns]
  int columns = 0;
  int products = 0;                       // in flight
  typename In::Register* home = nullptr;  // the fragment's registers; null when it is gone

  // fn(register, number in it, element of the row-major accumulator), for all numbers
  template <class Fn>
  void for_each_home(Fn fn) const {
    const int numbers = columns / 2;
    for (int t = 0; t < kWarpgroupThreads; ++t)
      for (int i = 0; i < numbers; ++i)
        fn(home[(t * numbers + i) / In::kNumbers], i % In::kNumbers,
           accumulator_row(t, i) * columns + accumulator_column(t, i));
  }
};

}  // namespace host

template <int N, class T = float>
struct Fragment {
  using In = host::AccumulatorRegister<T>;

  typename In::Register x[kWarpgroupThreads][N / 2 / In::kNumbers];
  std::shared_ptr<host::Accumulator<T>> accumulator = std::make_shared<host::Accumulator<T>>();
  host::Residence residence;

  Fragment() { std::memset(x, 0xff, sizeof x); }
  Fragment(const Fragment&) = delete;
  Fragment& operator=(const Fragment&) = delete;
  ~Fragment() {
    host::Residence::check_gone(in_flight(), "an accumulator");
    accumulator->home = nullptr;
  }
  bool in_flight() const { return accumulator->products > 0; }
  void touch() const { residence.touch(in_flight(), "an accumulator"); }
};

template <int K>
struct Operand {
  uint32_t x[kWarpgroupThreads][K / 4];
  std::shared_ptr<int> borrowed = std::make_shared<int>(0);  // products that read it
  host::Residence residence;

  Operand() { std::memset(x, 0xff, sizeof x); }
  Operand(const Operand&) = delete;
  Operand& operator=(const Operand&) = delete;
  ~Operand() { host::Residence::check_gone(in_flight(), "an operand"); }
  bool in_flight() const { return *borrowed > 0; }
  void touch() const { residence.touch(in_flight(), "an operand"); }
};

// Of bytes: a thread's register holds four.
template <int K>
struct Operand8 {
  uint32_t x[kWarpgroupThreads][K / 8];
  std::shared_ptr<int> borrowed = std::make_shared<int>(0);  // products that read it
  host::Residence residence;

  Operand8() { std::memset(x, 0xff, sizeof x); }
  Operand8(const Operand8&) = delete;
  Operand8& operator=(const Operand8&) = delete;
  ~Operand8() { host::Residence::check_gone(in_flight(), "an operand"); }
  bool in_flight() const { return *borrowed > 0; }
  void touch() const { residence.touch(in_flight(), "an operand"); }
};

struct RowValues {
  float x[kWarpgroupThreads][2];

  RowValues() { std::memset(x, 0xff, sizeof x); }
  void touch() const {}
};

template <class Registers>
auto& lane(Registers& f, int thread) {
  f.touch();
  return f.x[thread];
}

template <class Op>
void quad_reduce(RowValues& values, Op op) {
  const host::Agent& agent = *host::machine->current;
  auto& x = values.x;
  for (int t = agent.first_lane; t < agent.last_lane; t += 4) {
    for (int half = 0; half < 2; ++half) {
      const float all = op(op(x[t][half], x[t + 1][half]), op(x[t + 2][half], x[t + 3][half]));
      for (int i = 0; i < 4; ++i) x[t + i][half] = all;
    }
  }
}

template <int Rows, int N, class Op>
void neighbour_reduce(Fragment<N>& f, Op op) {
  host::whole_warpgroup("neighbour_reduce");
  f.touch();
  for (int apart = 1; apart < Rows; apart *= 2) {
    for (int t = 0; t < kWarpgroupThreads; ++t) {
      const int other = t ^ 4 * apart;
      if (other < t) continue;
      for (int i = 0; i < N / 2; ++i) f.x[t][i] = f.x[other][i] = op(f.x[t][i], f.x[other][i]);
    }
  }
}

struct WarpFlag {
  bool of[kWarpgroupThreads / kWarpThreads];
};

template <class Test>
WarpFlag any_row(const RowValues& a, const RowValues& b, const RowValues& c, Test test) {
  host::whole_warpgroup("any_row");
  WarpFlag flag = {};
  for (int t = 0; t < kWarpgroupThreads; ++t)
    for (int half = 0; half < 2; ++half)
      flag.of[t / kWarpThreads] |= test(a.x[t][half], b.x[t][half], c.x[t][half]);
  return flag;
}
template <class Then>
void if_warp(const WarpFlag& flag, Then then) {
  host::Agent& agent = host::whole_warpgroup("if_warp");
  for (int warp = 0; warp < kWarpgroupThreads / kWarpThreads; ++warp) {
    if (!flag.of[warp]) continue;
    agent.first_lane = warp * kWarpThreads;
    agent.last_lane = agent.first_lane + kWarpThreads;
    then();
  }
  agent.first_lane = 0;
  agent.last_lane = kWarpgroupThreads;
}
template <class Test, class Then>
void if_any_row(const RowValues& values, Test test, Then then) {
  if_warp(any_row(values, values, values, [&](float x, float, float) { return test(x); }), then);
}

inline int no_hoist(int x) { return x; }

}  // namespace vsa
