// SPDX-License-Identifier: Apache-2.0
// Calls that are prepared once and run with the addresses of the moment, like a linked program.
//
// A prepared call holds, in place of an address, a slot and an offset: bits 48 to 62 are the number
// of the slot, from 1, the bits below are bytes from the start of its tensor. A run gives an
// address for every slot. An address without a slot is one as it is, 0 is none; a slot whose
// address is 0 is none either, for tensors that a run may leave out.
#pragma once
#include <functional>
#include <string>
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

// How the fields of a call get their addresses, filled from its table.
template <class Call>
std::vector<void (*)(Call&, const Slots&)>& links() {
  static std::vector<void (*)(Call&, const Slots&)> all;
  return all;
}

template <class T>
void link(T& value, const Slots& slots) {
  if constexpr (std::is_pointer_v<T>)
    value = reinterpret_cast<T>(slots.resolve(reinterpret_cast<uintptr_t>(value)));
  else if constexpr (std::is_same_v<T, launch::TokenView> || std::is_same_v<T, launch::GateView> ||
                     std::is_same_v<T, launch::MatrixView>)
    link(value.data, slots);
  else if constexpr (std::is_same_v<T, launch::SequenceView>) {
    link(value.video, slots);
    link(value.prefix, slots);
    link(value.suffix, slots);
  } else if constexpr (std::is_same_v<T, std::vector<launch::MeanTensor>> ||
                       std::is_same_v<T, std::vector<launch::Product>> ||
                       std::is_same_v<T, std::vector<launch::RunTensor>> ||
                       std::is_same_v<T, std::vector<launch::TextTensor>>) {
    for (auto& one : value) link(one, slots);
  } else if constexpr (kClass<T> != nullptr) {
    for (const auto set : links<T>()) set(value, slots);
  }
}

// One launch of a program: a prepared call, and which of its methods.
struct Step {
  std::function<std::string(const Slots&, int device, void* stream)> launch;
  std::function<std::string(const Slots&, int blocks, unsigned seed)> emulate;
};

template <class Call>
Call linked(const Call& prepared, const Slots& slots) {
  Call call = prepared;
  for (const auto set : links<Call>()) set(call, slots);
  return call;
}

void bind_program(py::module_& m);

}  // namespace vsa::bind
