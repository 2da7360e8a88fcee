// SPDX-License-Identifier: Apache-2.0
// How Python writes the types that calls are made of, and how each is read: Python<T>.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <climits>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "launch/clean_text.h"
#include "launch/coarse_select.h"
#include "launch/fine.h"
#include "launch/float_product.h"
#include "launch/low_precision.h"
#include "launch/masked_coarse.h"
#include "launch/sub_blocks.h"
#include "launch/tail.h"

namespace vsa::bind {

namespace py = pybind11;

// A name that the stub gives to a type, what it stands for, and what its parts mean.
struct Alias {
  const char *name, *definition, *meaning;
};
constexpr Alias kAddress = {"Address", "int", "of contiguous elements; 0 where there are none"};
constexpr Alias kDtype = {"Dtype", "str", "bfloat16, float16 or float32"};
constexpr Alias kGridSizes = {"GridSizes", "Sequence[int]",
                              "T, H, W, tile t, h, w, prefix, suffix, in tokens"};
constexpr Alias kExtent = {"Extent", "tuple[int, int, int]", "along t, h and w"};
constexpr Alias kTokenView = {"TokenView", "tuple[int, int, int, int]",
                              "address; strides of batch, token and head, in elements"};
constexpr Alias kSequenceView = {"SequenceView", "tuple[TokenView, TokenView, TokenView]",
                                 "video, prefix, suffix"};
constexpr Alias kGateView = {
    "GateView", "tuple[int, int, int, int, int, int]",
    "address (0: no gate), 1 for float32, strides of batch, token, head and channel in elements"};
constexpr Alias kMatrixView = {"MatrixView", "tuple[int, int, int, int]",
                               "address; strides of matrix, row and column, in elements"};
constexpr Alias kAliases[] = {kAddress,   kDtype,        kGridSizes, kExtent,
                              kTokenView, kSequenceView, kGateView,  kMatrixView};

inline void require(bool holds, const std::string& otherwise) {
  if (!holds) throw py::value_error(otherwise);
}

inline Grid checked_grid(const std::array<int, 8>& n, const std::string& name) {
  for (int axis = 0; axis < 6; ++axis)
    require(n[axis] > 0, name + ": sizes of video and tile must be positive, got " +
                             std::to_string(n[axis]) + " at index " + std::to_string(axis));
  require(n[6] >= 0 && n[7] >= 0, name + ": prefix and suffix must not be negative");
  // Each product is bounded before the next factor joins, so that none of them can overflow.
  const auto volume_fits = [&](int axis, int64_t limit) {
    int64_t volume = n[axis];
    for (int next : {axis + 1, axis + 2})
      if (volume <= limit) volume *= n[next];
    return volume <= limit;
  };
  require(volume_fits(3, kTileRows), name + ": a tile must hold at most 64 tokens");
  require(volume_fits(0, int64_t{INT_MAX} - kTileRows - n[6] - n[7]),
          name + ": the sequence has more tokens than 31 bits can number");
  return make_grid({n[0], n[1], n[2]}, {n[3], n[4], n[5]}, n[6], n[7]);
}

constexpr struct {
  const char* name;
  launch::Dtype dtype;
} kDtypeNames[] = {{"bfloat16", launch::Dtype::Bf16},
                   {"float16", launch::Dtype::Fp16},
                   {"float32", launch::Dtype::Fp32}};

inline const char* name_of(launch::Dtype dtype) {
  for (const auto& known : kDtypeNames)
    if (known.dtype == dtype) return known.name;
  throw std::logic_error("a dtype has no name in kDtypeNames");
}

// The names of classes that are bound themselves and that other calls have as fields.
template <class T>
constexpr const char* kClass = nullptr;
template <>
inline constexpr const char* kClass<launch::Gates> = "Gates";
template <>
inline constexpr const char* kClass<launch::FineProblem> = "FineProblem";
template <>
inline constexpr const char* kClass<launch::FineForward> = "FineForward";
template <>
inline constexpr const char* kClass<launch::FineBackward> = "FineBackward";
template <>
inline constexpr const char* kClass<launch::ChannelStatistics> = "ChannelStatistics";
template <>
inline constexpr const char* kClass<launch::TailKeys> = "TailKeys";
template <>
inline constexpr const char* kClass<launch::MeanTensor> = "MeanTensor";
template <>
inline constexpr const char* kClass<launch::TileMeans> = "TileMeans";
template <>
inline constexpr const char* kClass<launch::SelectTiles> = "SelectTiles";
template <>
inline constexpr const char* kClass<launch::SoftmaxRows> = "SoftmaxRows";
template <>
inline constexpr const char* kClass<launch::Products> = "Products";
template <>
inline constexpr const char* kClass<launch::ScoreGradient> = "ScoreGradient";
template <>
inline constexpr const char* kClass<launch::MaskOfTiles> = "MaskOfTiles";
template <>
inline constexpr const char* kClass<launch::Product> = "Product";
template <>
inline constexpr const char* kClass<launch::RunTensor> = "RunTensor";
template <>
inline constexpr const char* kClass<launch::TextTensor> = "TextTensor";

// The items of a sequence of that length, of a list or tuple without a copy: a call has sixty.
template <size_t N>
std::array<PyObject*, N> items(py::handle x, py::object& owner) {
  owner = py::reinterpret_steal<py::object>(PySequence_Fast(x.ptr(), ""));
  if (!owner) PyErr_Clear();
  if (!owner || PySequence_Fast_GET_SIZE(owner.ptr()) != Py_ssize_t{N}) throw py::cast_error();
  std::array<PyObject*, N> found;
  for (size_t i = 0; i < N; ++i) found[i] = PySequence_Fast_GET_ITEM(owner.ptr(), Py_ssize_t(i));
  return found;
}

template <class T, size_t N>
std::array<T, N> integers(py::handle x) {
  py::object owner;
  const std::array<PyObject*, N> given = items<N>(x, owner);
  std::array<T, N> found;
  for (size_t i = 0; i < N; ++i) {
    const long long value = PyLong_AsLongLong(given[i]);
    if (value == -1 && PyErr_Occurred()) PyErr_Clear(), throw py::cast_error();
    if (value < std::numeric_limits<T>::min() || value > std::numeric_limits<T>::max())
      throw py::cast_error();
    found[i] = static_cast<T>(value);
  }
  return found;
}

// type(): what the stub says. read(x, name): the value; throws pybind11::cast_error where x is of
// another type. The name is that of the field, for sentences about its value.
template <class T>
struct Python {
  static std::string type() {
    if constexpr (std::is_same_v<T, bool>)
      return "bool";
    else if constexpr (std::is_integral_v<T>)
      return "int";
    else if constexpr (std::is_floating_point_v<T>)
      return "float";
    else
      return kClass<T>;
  }
  static T read(py::handle x, const std::string&) { return x.cast<T>(); }
};

template <class T>
struct Python<std::vector<T>> {
  static std::string type() { return "Sequence[" + Python<T>::type() + "]"; }
  static std::vector<T> read(py::handle x, const std::string&) { return x.cast<std::vector<T>>(); }
};

template <class T>
struct Python<T*> {
  static std::string type() { return kAddress.name; }
  static T* read(py::handle x, const std::string&) {
    return reinterpret_cast<T*>(x.cast<uintptr_t>());
  }
};

template <>
struct Python<launch::Dtype> {
  static std::string type() { return kDtype.name; }
  static launch::Dtype read(py::handle x, const std::string& name) {
    const auto given = x.cast<std::string>();
    for (const auto& known : kDtypeNames)
      if (given == known.name) return known.dtype;
    throw py::value_error(name + " must be " + kDtype.meaning + ", but it is " + given);
  }
};

template <>
struct Python<Grid> {
  static std::string type() { return kGridSizes.name; }
  static Grid read(py::handle x, const std::string& name) {
    return checked_grid(integers<int, 8>(x), name);
  }
};

template <>
struct Python<Axes> {
  static std::string type() { return kExtent.name; }
  static Axes read(py::handle x, const std::string&) {
    const auto n = integers<int, 3>(x);
    return {n[0], n[1], n[2]};
  }
};

template <>
struct Python<launch::TokenView> {
  static std::string type() { return kTokenView.name; }
  static launch::TokenView read(py::handle x, const std::string&) {
    const auto n = integers<int64_t, 4>(x);
    return {reinterpret_cast<const void*>(n[0]), n[1], n[2], n[3]};
  }
};

template <>
struct Python<launch::MatrixView> {
  static std::string type() { return kMatrixView.name; }
  static launch::MatrixView read(py::handle x, const std::string&) {
    const auto n = integers<int64_t, 4>(x);
    return {reinterpret_cast<float*>(n[0]), n[1], n[2], n[3]};
  }
};

template <>
struct Python<launch::SequenceView> {
  static std::string type() { return kSequenceView.name; }
  static launch::SequenceView read(py::handle x, const std::string& name) {
    py::object owner;
    const std::array<PyObject*, 3> parts = items<3>(x, owner);
    using View = Python<launch::TokenView>;
    return {View::read(parts[0], name), View::read(parts[1], name), View::read(parts[2], name)};
  }
};

template <>
struct Python<launch::GateView> {
  static std::string type() { return kGateView.name; }
  static launch::GateView read(py::handle x, const std::string&) {
    const auto n = integers<int64_t, 6>(x);
    return {reinterpret_cast<const void*>(n[0]), n[1] != 0, n[2], n[3], n[4], n[5]};
  }
};

}  // namespace vsa::bind
