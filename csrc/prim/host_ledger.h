// SPDX-License-Identifier: Apache-2.0
// The emulator's ledger: every touch of shared memory, and who may rely on its being finished. A
// touch is legal if its author knows that every conflicting earlier one is finished, and, from the
// generic to the async proxy, fenced. This holds for all schedules or for none, so that a missing
// barrier needs no luck to be found.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "prim/operand.h"

namespace vsa::host {

// A bug in a kernel, by its name: "RACE ...", "DEADLOCK ...".
struct Hazard : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Things that happen are numbered per clock: each agent has one for each way in which its work
// finishes, each mbarrier one for its phases.
enum AgentClock {
  kTouches,      // ordinary loads and stores, as each warp knows of its own part
  kTouchesMet,   // ... of all parts
  kFences,       // ... visible to the async proxy
  kFencesMet,    // ... of all warps, as all warps know
  kProducts,     // wgmma groups, as each warp knows of its own part
  kProductsMet,  // ... of all parts
  kStores,       // groups of TMA stores that have read their memory, as one thread knows
  kStoresMet,    // ... as all warps know
  kClocksPerAgent
};
constexpr int kMaxAgents = 9;
constexpr int kMaxBarriers = 256;
constexpr int kClocks = kMaxAgents * kClocksPerAgent + kMaxBarriers;

struct Event {
  int clock;
  int time;
};

// All that an agent may rely on: everything up to a time, on each clock. Barriers pass it on.
struct Knowledge {
  std::array<int32_t, kClocks> upto{};

  bool has(Event event) const { return upto[event.clock] >= event.time; }
  void merge(const Knowledge& other) {
    for (int i = 0; i < kClocks; ++i) upto[i] = std::max(upto[i], other.upto[i]);
  }
};

struct Access {
  uint32_t begin, end;  // bytes of shared memory
  bool write, async;    // async: by TMA or wgmma
  Layout layout;        // how the bytes lie, or are taken to lie
  const char* author;   // name of an agent
  const char* verb;     // "wgmma read of"
  Event finished;
  Event fenced = {};   // of an ordinary store: visible to the async proxy
  Event own_met = {};  // before the author's own touch by the other proxy: all its warps are done
  Event others_met = {};  // before anyone else's
};

struct Label {
  uint32_t begin, end;
  std::string name;
};

class Ledger {
 public:
  void add_label(Label label) {
    if (label.end > kSharedBytes)
      throw Hazard("SHARED MEMORY: " + label.name + " ends at byte " + std::to_string(label.end) +
                   " of " + std::to_string(kSharedBytes));
    labels_.push_back(std::move(label));
  }

  const Label* label_at(uint32_t address) const {
    for (const Label& label : labels_)
      if (address >= label.begin && address < label.end) return &label;
    return nullptr;
  }

  std::string name_of(uint32_t address) const {
    const Label* label = label_at(address);
    return label != nullptr ? label->name : "byte " + std::to_string(address);
  }

  // Throws unless `now` is ordered after all that it conflicts with, as far as its author knows.
  void touch(const Access& now, const Knowledge& known) {
    if (now.begin >= now.end || now.end > kSharedBytes)
      throw Hazard("OUT OF BOUNDS: " + describe(now) + " ends at byte " + std::to_string(now.end) +
                   " of " + std::to_string(kSharedBytes));
    if (now.write)
      for_each_word(now, [](uint64_t& written, uint64_t grains) { written |= grains; });
    else
      for_each_word(now, [&](uint64_t& written, uint64_t grains) {
        if ((grains & ~written) != 0) report_unwritten(now);
      });
    for (uint32_t page = now.begin / kPageBytes; page <= (now.end - 1) / kPageBytes; ++page) {
      Access part = now;
      part.begin = std::max(now.begin, page * kPageBytes);
      part.end = std::min(now.end, (page + 1) * kPageBytes);
      touch_page(pages_[page], part, known);
    }
  }

 private:
  static constexpr uint32_t kPageBytes = kPanelBytes;
  static constexpr uint32_t kPages = kSharedBytes / kPageBytes + 1;
  static constexpr uint32_t kGrainBytes = 4;  // the smallest value that kernels keep there
  static constexpr uint32_t kGrains = kSharedBytes / kGrainBytes;

  // fn(word of written_, its bits that an access covers)
  template <class Fn>
  void for_each_word(const Access& access, Fn fn) {
    const uint32_t first = access.begin / kGrainBytes, last = (access.end - 1) / kGrainBytes;
    for (uint32_t word = first / 64; word <= last / 64; ++word) {
      uint64_t grains = ~uint64_t{0};
      if (word == first / 64) grains &= ~uint64_t{0} << first % 64;
      if (word == last / 64) grains &= ~uint64_t{0} >> (63 - last % 64);
      fn(written_[word], grains);
    }
  }

  [[noreturn]] void report_unwritten(const Access& access) const {
    uint32_t grain = access.begin / kGrainBytes;
    while ((written_[grain / 64] >> grain % 64 & 1) != 0) ++grain;
    throw Hazard("NEVER WRITTEN: [" + describe(access) + "] takes in byte " +
                 std::to_string(std::max(grain * kGrainBytes, access.begin) - access.begin) +
                 ", to which nothing has been stored");
  }

  void touch_page(std::vector<Access>& page, const Access& now, const Knowledge& known) {
    size_t kept = 0;
    for (size_t i = 0; i < page.size(); ++i) {
      const Access& old = page[i];
      if (old.begin < now.end && now.begin < old.end) {
        if (old.write || now.write) check(old, now, known);
        if (supersedes(now, old, known)) continue;
      }
      if (kept != i) page[kept] = old;
      ++kept;
    }
    page.resize(kept);
    page.push_back(now);
  }

  // Whoever knows that `now` is finished will know it of `old` as well, and `now` conflicts with
  // all that `old` conflicts with: the page need not remember `old`. So it holds at most one write
  // of a byte, and one read of it per clock.
  static bool supersedes(const Access& now, const Access& old, const Knowledge& known) {
    const bool covers = now.begin <= old.begin && old.end <= now.end && (now.write || !old.write);
    const bool later = now.finished.clock == old.finished.clock && now.async == old.async;
    return covers && (later || known.has(old.finished));
  }

  void check(const Access& old, const Access& now, const Knowledge& known) const {
    if (!known.has(old.finished))
      throw Hazard("RACE: [" + describe(now) + "] is not ordered after [" + describe(old) + "]");
    if (old.write && !old.async && now.async && !known.has(old.fenced))
      throw Hazard("MISSING PROXY FENCE between [" + describe(old) + "] and [" + describe(now) +
                   "]");
    const bool own = old.author == now.author;
    if (own ? old.async != now.async && !known.has(old.own_met) : !known.has(old.others_met))
      throw Hazard("MISSING NAMED BARRIER between [" + describe(old) + "] and [" + describe(now) +
                   "]: other warps may not have come that far");
    const bool mixed = old.layout != Layout::Any && now.layout != Layout::Any;
    if (old.write && !now.write && mixed && old.layout != now.layout)
      throw Hazard("WRONG SWIZZLE: [" + describe(now) + "] takes rows to be " + name(now.layout) +
                   ", but [" + describe(old) + "] left them " + name(old.layout));
  }

  std::string describe(const Access& access) const {
    return std::string(access.author) + ": " + access.verb + " " + name_of(access.begin);
  }

  static const char* name(Layout layout) {
    return layout == Layout::Swizzled     ? "swizzled"
           : layout == Layout::Swizzled64 ? "swizzled, two to a line"
                                          : "in plain order";
  }

  std::vector<Label> labels_;
  std::array<std::vector<Access>, kPages> pages_;
  std::array<uint64_t, kGrains / 64 + 1> written_{};  // a bit per grain
};

}  // namespace vsa::host
