// SPDX-License-Identifier: Apache-2.0
// Calls that are prepared once and run with the addresses of the moment, like a linked program.
//
// A prepared call holds, in place of an address, a slot and an offset: bits 48 to 62 are the number
// of the slot, from 1, the bits below are bytes from the start of its tensor. A run gives an
// address for every slot. An address without a slot is one as it is, 0 is none; a slot whose
// address is 0 is none either, for tensors that a run may leave out.
#pragma once
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "bind/arguments.h"

namespace vsa::bind {

struct Slots {
  std::vector<uintptr_t> addresses;

  uintptr_t resolve(uintptr_t prepared) const {
    constexpr int kOffsetBits = 48;
    const uintptr_t slot = prepared >> kOffsetBits;
    if (slot == 0) return prepared;
    require(slot <= addresses.size(), "addresses: " + std::to_string(addresses.size()) +
                                          " are given, but a call uses slot " +
                                          std::to_string(slot));
    const uintptr_t start = addresses[slot - 1];
    return start == 0 ? 0 : start + (prepared & ((uintptr_t{1} << kOffsetBits) - 1));
  }
};

// Gives a field of a prepared call the addresses of a run.
using Link = void (*)(void* field, const Slots&);
struct LinkedField {
  void* (*at)(void* call);
  Link link;
};

// The fields of a call that hold addresses, filled from its table.
template <class Call>
std::vector<LinkedField>& links() {
  static std::vector<LinkedField> all;
  return all;
}

template <class T>
constexpr bool kIsView =
    std::is_same_v<T, launch::TokenView> || std::is_same_v<T, launch::GateView> ||
    std::is_same_v<T, launch::MatrixView>;
template <class T>
constexpr bool kHoldsAddresses = std::is_pointer_v<T> || kIsView<T> ||
                                 std::is_same_v<T, launch::SequenceView> || kClass<T> != nullptr;
template <class T>
constexpr bool kHoldsAddresses<std::vector<T>> = kHoldsAddresses<T>;

template <class T>
void link(void* field, const Slots& slots) {
  T& value = *static_cast<T*>(field);
  if constexpr (std::is_pointer_v<T>) {
    value = reinterpret_cast<T>(slots.resolve(reinterpret_cast<uintptr_t>(value)));
  } else if constexpr (kIsView<T>) {
    link<decltype(value.data)>(&value.data, slots);
  } else if constexpr (std::is_same_v<T, launch::SequenceView>) {
    for (launch::TokenView* part : {&value.video, &value.prefix, &value.suffix})
      link<launch::TokenView>(part, slots);
  } else if constexpr (kClass<T> != nullptr) {
    for (const LinkedField& known : links<T>()) known.link(known.at(&value), slots);
  } else {
    for (auto& one : value) link<typename T::value_type>(&one, slots);
  }
}

template <class T>
constexpr Link link_of() {
  if constexpr (kHoldsAddresses<T>)
    return link<T>;
  else
    return nullptr;
}

template <class Call>
Call linked(const Call& prepared, const Slots& slots) {
  Call call = prepared;
  for (const LinkedField& known : links<Call>()) known.link(known.at(&call), slots);
  return call;
}

// How a method runs calls of its class, whichever that is: what `call` points to.
struct Runs {
  const void* (*read)(py::handle self);
  std::shared_ptr<const void> (*copied)(const void* call);
  std::string (*launch)(const void* call, const Slots*, int device, void* stream);
  std::string (*emulate)(const void* call, const Slots*, int blocks, unsigned seed);
};

// One launch of a program: a prepared call, and which of its methods.
struct Step {
  std::shared_ptr<const void> prepared;
  Runs runs;
};

void bind_program(py::module_& m);

}  // namespace vsa::bind
