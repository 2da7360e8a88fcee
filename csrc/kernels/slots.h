// SPDX-License-Identifier: Apache-2.0
// Slots of a ring that belong to some of its consumers. Beside what is loaded into a slot, the
// producer leaves who wants it, which of its rows are tokens, and whether it is the item's last.
// Consumers look at every slot in turn and give back at once what is not theirs.
#pragma once
#include <climits>

#include "tile/ring.h"
#include "tile/tile.h"

namespace vsa {

template <int Stages, int Consumers>
struct Slots {
  static constexpr uint32_t kLast = 1u << Consumers;  // below it, the owners

  Shared<uint64_t> rows[Stages];
  Shared<uint32_t> flags[Stages];  // owners and kLast
  Ring<Stages> ring;

  VSA_DEVICE void init() {
    ring.init(Consumers, "slot_full", "slot_empty");
    for (int i = 0; i < Stages; ++i) {
      label(rows[i], "rows", i);
      label(flags[i], "flags", i);
    }
  }

  // ---- producer, one thread ----

  // Waits until slot n is free, says what it is, and returns the barrier that `bytes` of copies
  // into its stage must count on. what: owners and kLast
  VSA_DEVICE Mbarrier& post(int n, uint32_t what, uint64_t tokens, int bytes) {
    ring.wait_empty(n);
    rows[ring.stage(n)].set(tokens);
    flags[ring.stage(n)].set(what);
    return ring.expect(n, bytes);
  }
  // An item without any has one slot that is nobody's.
  VSA_DEVICE void post_nothing(int n) {
    ring.wait_empty(n);
    rows[ring.stage(n)].set(0);
    flags[ring.stage(n)].set(kLast);
    ring.full[ring.stage(n)].arrive_one();
  }

  // ---- consumers, a whole warpgroup each ----

  struct Slot {
    int number, stage;
    uint64_t rows;
  };

  // The slots of one item as a consumer sees them.
  class View {
   public:
    static constexpr int kEnd = -1;  // the item has no more
    static constexpr int kFar = -2;  // the next one is not before the limit

    VSA_DEVICE View(Slots& s, int w) : s_(s), w_(w) {}

    VSA_DEVICE void begin_item() { ended_ = false; }

    // The next slot that is ours, full. Those before it are released, and none from `limit` on is
    // waited for: the producer cannot fill it while we hold slot limit - Stages.
    VSA_DEVICE Slot take(int limit) {
      while (!ended_ && seen_ < limit) {
        const int number = seen_++;
        const int stage = Ring<Stages>::stage(number);
        s_.ring.wait(number);
        const uint32_t flags = s_.flags[stage].get();
        const uint64_t rows = s_.rows[stage].get();
        ended_ = (flags & kLast) != 0;
        if (flags >> w_ & 1) return {number, stage, rows};
        s_.ring.release(number);
      }
      return {ended_ ? kEnd : kFar, 0, 0};
    }
    // The next one after `held`, while that is the oldest that we hold.
    VSA_DEVICE Slot take_after(const Slot& held) { return take(held.number + Stages); }
    VSA_DEVICE Slot take_first() { return take(INT_MAX); }

    VSA_DEVICE void release(const Slot& slot) { s_.ring.release(slot.number); }

   private:
    Slots& s_;
    int w_, seen_ = 0;
    bool ended_ = false;
  };
};

}  // namespace vsa
