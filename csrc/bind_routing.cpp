// SPDX-License-Identifier: Apache-2.0
// Means and selection in vsa._C: pointers and strides in, an exception out.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "bind.h"
#include "kernels/softmax_mass.h"
#include "launch/routing.h"

namespace py = pybind11;

namespace vsa::bind {
namespace {

// Address, strides of batch, token and head in elements; grid; heads; address of the means.
using Tensor = std::tuple<std::array<int64_t, 4>, GridNumbers, int, uintptr_t>;

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

launch::MeanElement element_of(const std::string& name) {
  if (name == "bfloat16") return launch::MeanElement::Bf16;
  if (name == "float16") return launch::MeanElement::Fp16;
  require(name == "float32", "element: must be bfloat16, float16 or float32, not " + name);
  return launch::MeanElement::Fp32;
}

launch::TileMeans means_call(const std::vector<Tensor>& tensors,
                             int batch,
                             int head_dim,
                             const std::string& element) {
  require(batch > 0 && head_dim > 0, "batch and head_dim: must be positive");
  launch::TileMeans call{{}, batch, head_dim, element_of(element)};
  for (const auto& [view, grid, heads, means] : tensors) {
    require(heads > 0, "heads: must be positive");
    call.tensors.push_back({{pointer<const void>(view[0]), view[1], view[2], view[3]},
                            checked_grid(grid),
                            heads,
                            pointer<float>(static_cast<int64_t>(means))});
  }
  return call;
}

launch::SelectTiles select_call(uintptr_t scores,
                                uintptr_t must,
                                uintptr_t selected,
                                uintptr_t weights,
                                int first_row,
                                int rows,
                                int columns,
                                int query_tiles,
                                const std::vector<int>& counts,
                                double mass) {
  require(rows > 0 && columns > 0 && query_tiles > 0 && first_row >= 0,
          "rows, columns and query_tiles: must be positive");
  for (int count : counts) require(count > 0, "counts: must be positive");
  require(mass >= 0 && mass <= 1, "mass: must be in [0, 1]");
  return {pointer<const float>(scores),
          pointer<const uint32_t>(must),
          pointer<uint32_t>(selected),
          pointer<float>(weights),
          first_row,
          rows,
          columns,
          query_tiles,
          counts,
          mass};
}

// Address of the values, of the pieces, and rows.
using Operand = std::tuple<uintptr_t, uintptr_t, int64_t>;

launch::SplitOperands split_call(const Operand& left,
                                 const Operand& right,
                                 int depth,
                                 float scale) {
  const auto [left_values, left_pieces, left_rows] = left;
  const auto [right_values, right_pieces, right_rows] = right;
  require(left_rows > 0 && right_rows > 0 && depth > 0, "rows and depth: must be positive");
  return {pointer<const float>(left_values),
          pointer<const float>(right_values),
          pointer<uint16_t>(left_pieces),
          pointer<uint16_t>(right_pieces),
          left_rows,
          right_rows,
          depth,
          scale};
}

// A class of calls with `launch(stream)` for a GPU and `on_cpu()` for the same source on a CPU.
template <class Call, auto on_gpu, auto on_cpu, class Init, class... Arguments>
void bind_call(py::module_& m, const char* name, const char* doc, Init init, Arguments... named) {
  py::class_<Call>(m, name, doc)
      .def(py::init(init), py::kw_only(), named...)
      .def(
          "launch",
          [](const Call& call, uintptr_t stream) {
            raise_if(on_gpu(call, reinterpret_cast<void*>(stream)));
          },
          py::arg("stream"), py::call_guard<py::gil_scoped_release>())
      .def(
          "on_cpu", [](const Call& call) { raise_if(on_cpu(call)); },
          py::call_guard<py::gil_scoped_release>());
}

}  // namespace

void bind_routing(py::module_& m) {
  bind_call<launch::TileMeans, launch::tile_means, launch::tile_means_on_cpu>(
      m, "TileMeans", "Means of the tiles of up to three tensors.", &means_call, py::arg("tensors"),
      py::arg("batch"), py::arg("head_dim"), py::arg("element"));
  bind_call<launch::SelectTiles, launch::select_tiles, launch::select_tiles_on_cpu>(
      m, "SelectTiles", "The tiles that rows of scores keep.", &select_call, py::arg("scores"),
      py::arg("must"), py::arg("selected"), py::arg("weights"), py::arg("first_row"),
      py::arg("rows"), py::arg("columns"), py::arg("query_tiles"), py::arg("counts"),
      py::arg("mass"));
  bind_call<launch::SplitOperands, launch::split_operands, launch::split_operands_on_cpu>(
      m, "SplitOperands", "Operands of a product of fp32 matrices as deeper ones in bf16.",
      &split_call, py::arg("left"), py::arg("right"), py::arg("depth"), py::arg("scale"));
  m.def("softmax_weight", &softmax_weight, py::arg("gap"),
        "-> weight of a score that lies so far below the largest of its row, 2^31 for 0");
  m.attr("MOST_HEAD_BUDGETS") = launch::kMostHeadBudgets;
}

}  // namespace vsa::bind
