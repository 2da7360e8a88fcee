// SPDX-License-Identifier: Apache-2.0
// What can be wrong with the test kernels. tests/emulator/test_emulator.py says how each must be
// reported.
#pragma once
#include <iterator>

namespace vsa::test {

enum class Bug {
  None,
  NoFullWait,
  NoEmptyWait,
  EarlyRelease,
  NoProductWait,
  WaitTooShallow,
  NoProxyFence,
  NoTailFence,
  NoNamedBarrier,
  NoWgmmaFence,
  WrongPhase,
  ExpectsTooMuch,
  ExpectsTooLittle,
  ExpectsNothing,
  PlainMap,
  PlainStores,
  WrongStride,
  WrongLeading,
  WrongStep,
  NoTranspose,
  LostArrive,
  DoubleRelease,
  StoreBufferReused,
  StoreNotAwaited,
  DivergedRelease,
  ReleasedUnseen,
  OperandReused,
  NotElected,
  LoadsTooMany,
  LoneRelease,
  NoTailZeros,
  NoMask,
  // in products.h
  StagingReused,
  StagingNotAwaited,
  StoreNotCommitted,
  BarrierNotInitialised,
  LonelyMeeting,
  CrookedMap,
  TileNotLabelled,
  Count,
};

constexpr const char* kBugs[] = {
    "None",
    "NoFullWait",
    "NoEmptyWait",
    "EarlyRelease",
    "NoProductWait",
    "WaitTooShallow",
    "NoProxyFence",
    "NoTailFence",
    "NoNamedBarrier",
    "NoWgmmaFence",
    "WrongPhase",
    "ExpectsTooMuch",
    "ExpectsTooLittle",
    "ExpectsNothing",
    "PlainMap",
    "PlainStores",
    "WrongStride",
    "WrongLeading",
    "WrongStep",
    "NoTranspose",
    "LostArrive",
    "DoubleRelease",
    "StoreBufferReused",
    "StoreNotAwaited",
    "DivergedRelease",
    "ReleasedUnseen",
    "OperandReused",
    "NotElected",
    "LoadsTooMany",
    "LoneRelease",
    "NoTailZeros",
    "NoMask",
    "StagingReused",
    "StagingNotAwaited",
    "StoreNotCommitted",
    "BarrierNotInitialised",
    "LonelyMeeting",
    "CrookedMap",
    "TileNotLabelled",
};
static_assert(std::size(kBugs) == static_cast<size_t>(Bug::Count), "every bug has a name");

// Which bug a kernel has. Without any it is what nvcc compiles. Chosen while a program runs: one
// kernel for all bugs.
struct NoBugs {
  static constexpr Bug bug = Bug::None;
};
struct ChosenBug {
  static inline Bug bug = Bug::None;
};

}  // namespace vsa::test
