// SPDX-License-Identifier: Apache-2.0
// vsa._C: numbers, addresses and a stream handle in; Python objects or an exception out.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/typing.h>

#include <string>
#include <utility>

#include "bind/fields.h"
#include "launch/build_info.h"

namespace vsa::bind {
namespace {

py::typing::Dict<std::string, py::object> build_info() {
#if defined(__clang__)
  constexpr const char* compiler = "clang " __clang_version__;
#else
  constexpr const char* compiler = "gcc " __VERSION__;
#endif
  const launch::CudaPart cuda = launch::cuda_part();
  py::typing::Dict<std::string, py::object> info;
  info["version"] = VSA_VERSION;
  info["compiler"] = compiler;
  info["cuda"] = cuda.built;
  info["cuda_version"] = cuda.built ? py::cast(std::to_string(cuda.version / 1000) + "." +
                                               std::to_string(cuda.version % 1000 / 10))
                                    : py::none();
  info["architectures"] = py::str(cuda.architectures).attr("split")();
  return info;
}

std::pair<int, std::string> device_count() {
  int count = 0;
  std::string reason = launch::device_count(&count);
  return {count, std::move(reason)};
}

py::dict types() {
  py::dict types;
  for (const Alias& alias : kAliases)
    types[alias.name] = py::make_tuple(alias.definition, alias.meaning);
  return types;
}

}  // namespace
}  // namespace vsa::bind

PYBIND11_MODULE(_C, m) {
  using namespace vsa::bind;
  m.doc() = "Compiled part of vsa: each class is a call, its keywords are in FIELDS.";
  m.def("build_info", build_info, "Version, compiler, cuda, cuda_version, architectures.");
  m.def("device_count", device_count, "CUDA devices, and why there are none or an empty string.");
  m.attr("TYPES") = types();
  bind_program(m);
  bind_fine(m);
  bind_coarse_select(m);
  bind_float_product(m);
  bind_tail(m);
  bind_sub_blocks(m);
  bind_low_precision(m);
  bind_masked_coarse(m);
  bind_chunks(m);
  bind_padded(m);
}
