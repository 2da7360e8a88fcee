// SPDX-License-Identifier: Apache-2.0
// Slots of two rings, for what belongs together and is not needed for as long: a tile of keys, and
// its values. Slot n of one goes with slot n of the other, and both belong to some of the
// consumers. Beside the keys the producer leaves who wants them, which of their rows are tokens,
// and whether they are the item's last.
//
// Consumers look at every slot of the keys in turn and give back at once what is not theirs; values
// in between they pass over only when they come to those that they want.
#pragma once
#include <climits>

#include "tile/ring.h"
#include "tile/tile.h"

namespace vsa {

template <int KeyStages, int ValueStages, int Consumers>
struct SlotPairs {
  static constexpr uint32_t kLast = 1u << Consumers;  // below it, the owners

  Shared<uint64_t> rows[KeyStages];
  Shared<uint32_t> flags[KeyStages];  // owners and kLast
  Ring<KeyStages> keys;
  Ring<ValueStages> values;

  VSA_DEVICE void init() {
    keys.init(Consumers, "key_full", "key_empty");
    values.init(Consumers, "value_full", "value_empty");
    for (int i = 0; i < KeyStages; ++i) {
      label(rows[i], "rows", i);
      label(flags[i], "flags", i);
    }
  }

  // ---- producers, one thread each ----

  // Waits until slot n is free, says what it is, and returns the barrier that `bytes` of copies
  // into its stage must count on. what: owners and kLast
  VSA_DEVICE Mbarrier& post_keys(int n, uint32_t what, uint64_t tokens, int bytes) {
    keys.wait_empty(n);
    rows[keys.stage(n)].set(tokens);
    flags[keys.stage(n)].set(what);
    return keys.expect(n, bytes);
  }
  // An item without any has one slot that is nobody's.
  VSA_DEVICE void post_no_keys(int n) {
    keys.wait_empty(n);
    rows[keys.stage(n)].set(0);
    flags[keys.stage(n)].set(kLast);
    keys.full[keys.stage(n)].arrive_one();
  }
  VSA_DEVICE void post_no_values(int n) {
    values.wait_empty(n);
    values.full[values.stage(n)].arrive_one();
  }

  // ---- consumers, a whole warpgroup each ----

  struct Slot {
    int number, key_stage, value_stage;
    uint64_t rows;
  };

  // The slots of one item as a consumer sees them.
  class View {
   public:
    static constexpr int kEnd = -1;  // the item has no more
    static constexpr int kFar = -2;  // the next one comes only after values that we hold

    VSA_DEVICE View(SlotPairs& s, int w) : s_(s), w_(w) {}

    VSA_DEVICE void begin_item() { ended_ = false; }

    // The next slot that is ours, its keys there. Those before it are released. None is waited for
    // whose values cannot be loaded before we give back some of ours: others may need these to go
    // on, and we need them to.
    VSA_DEVICE Slot take() {
      while (!ended_ && seen_ - values_seen_ < ValueStages) {
        const int number = seen_++;
        const int stage = s_.keys.stage(number);
        s_.keys.wait(number);
        const uint32_t flags = s_.flags[stage].get();
        const uint64_t rows = s_.rows[stage].get();
        ended_ = (flags & kLast) != 0;
        if (flags >> w_ & 1) return {number, stage, s_.values.stage(number), rows};
        s_.keys.release(number);
      }
      return {ended_ ? kEnd : kFar, 0, 0, 0};
    }
    // The same while nothing is held.
    VSA_DEVICE Slot take_first() {
      Slot slot = take();
      for (; slot.number == kFar; slot = take()) s_.values.skip(values_seen_++);
      return slot;
    }
    VSA_DEVICE void release_keys(const Slot& slot) { s_.keys.release(slot.number); }

    VSA_DEVICE void wait_values(const Slot& slot) {
      while (values_seen_ < slot.number) s_.values.skip(values_seen_++);
      s_.values.wait(slot.number);
    }
    VSA_DEVICE void release_values(const Slot& slot) {
      s_.values.release(slot.number);
      ++values_seen_;
    }
    VSA_DEVICE void end_item() {
      while (values_seen_ < seen_) s_.values.skip(values_seen_++);
    }

   private:
    SlotPairs& s_;
    int w_, seen_ = 0, values_seen_ = 0;
    bool ended_ = false;
  };
};

}  // namespace vsa
