// SPDX-License-Identifier: Apache-2.0
// What can be wrong with the test kernels. tests/emulator/test_emulator.py says how each must be
// reported.
#pragma once
#include <iterator>

namespace vsa::test {

enum class Mutant {
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
  LoadBeforeTheTensor,
  StoreBeforeTheTensor,
  TileNotLabelled,
  Count,
};

constexpr const char* kMutants[] = {
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
    "LoadBeforeTheTensor",
    "StoreBeforeTheTensor",
    "TileNotLabelled",
};
static_assert(std::size(kMutants) == static_cast<size_t>(Mutant::Count), "every mutant has a name");

// Which mutant a kernel has. Without any it is what nvcc compiles. Chosen while a program runs: one
// kernel for all mutants.
struct NoMutants {
  static constexpr Mutant mutant = Mutant::None;
};
struct ChosenMutant {
  static inline Mutant mutant = Mutant::None;
};

}  // namespace vsa::test
