// SPDX-License-Identifier: Apache-2.0
// The fine stage in vsa._C: pointers and strides in, an exception out.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "bind.h"
#include "launch/fine.h"

namespace py = pybind11;

namespace vsa::bind {
namespace {

using View = std::array<int64_t, 4>;  // address, strides of batch, token and head in elements
using Views = std::array<View, 3>;    // video, prefix, suffix

launch::TokenView view(const View& v) {
  return {reinterpret_cast<const void*>(v[0]), v[1], v[2], v[3]};
}
launch::SequenceView sequence(const Views& v) { return {view(v[0]), view(v[1]), view(v[2])}; }

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

launch::FineForward forward_call(const Views& q,
                                 const Views& k,
                                 const Views& v,
                                 const Views& out,
                                 const GridNumbers& grid,
                                 const GridNumbers& kv_grid,
                                 int batch,
                                 int heads,
                                 int kv_heads,
                                 int head_dim,
                                 bool bf16,
                                 float scale,
                                 uintptr_t selected,
                                 uintptr_t query_text_rows,
                                 uintptr_t key_text_rows,
                                 uintptr_t lse) {
  launch::FineForward call;
  call.q = sequence(q);
  call.k = sequence(k);
  call.v = sequence(v);
  call.out = sequence(out);
  call.grid = checked_grid(grid);
  call.kv_grid = checked_grid(kv_grid);
  call.batch = batch;
  call.heads = heads;
  call.kv_heads = kv_heads;
  call.head_dim = head_dim;
  call.element = bf16 ? launch::ElementType::Bf16 : launch::ElementType::Fp16;
  call.scale = scale;
  call.selected = pointer<const uint32_t>(selected);
  call.query_text_rows = pointer<const uint64_t>(query_text_rows);
  call.key_text_rows = pointer<const uint64_t>(key_text_rows);
  call.lse = pointer<float>(lse);
  return call;
}

}  // namespace

void bind_fine(py::module_& m) {
  py::class_<launch::FineForward>(m, "FineForward", "One call of the forward kernel.")
      .def(py::init(&forward_call), py::kw_only(), py::arg("q"), py::arg("k"), py::arg("v"),
           py::arg("out"), py::arg("grid"), py::arg("kv_grid"), py::arg("batch"), py::arg("heads"),
           py::arg("kv_heads"), py::arg("head_dim"), py::arg("bf16"), py::arg("scale"),
           py::arg("selected"), py::arg("query_text_rows"), py::arg("key_text_rows"),
           py::arg("lse"))
      .def(
          "launch",
          [](const launch::FineForward& call, int device, uintptr_t stream) {
            raise_if(launch::fine_forward(call, device, pointer<void>(stream)));
          },
          py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>())
      .def(
          "emulate",
          [](const launch::FineForward& call, int blocks, unsigned seed) {
            raise_if(launch::fine_forward_emulated(call, blocks, seed));
          },
          py::arg("blocks"), py::arg("seed"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace vsa::bind
