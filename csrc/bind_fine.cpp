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

// address (0: not there), 1 for fp32, strides of batch, token, head and channel in elements
using GateNumbers = std::array<int64_t, 6>;

launch::GateView gate(const GateNumbers& x) {
  return {reinterpret_cast<const void*>(x[0]), x[1] != 0, x[2], x[3], x[4], x[5]};
}

launch::Gates make_gates(const GateNumbers& fine, const GateNumbers& coarse, uintptr_t rows) {
  return {gate(fine), gate(coarse), pointer<const float>(rows)};
}

launch::Combine combine_call(const View& fine,
                             const View& out,
                             const launch::Gates& gates,
                             const GridNumbers& grid,
                             int batch,
                             int heads,
                             int head_dim,
                             bool bf16) {
  return {view(fine), view(out),
          gates,      checked_grid(grid),
          batch,      heads,
          head_dim,   bf16 ? launch::ElementType::Bf16 : launch::ElementType::Fp16};
}

launch::FineForward forward_call(const Views& q,
                                 const Views& k,
                                 const Views& v,
                                 const Views& out,
                                 const launch::Gates& gates,
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
                                 uintptr_t query_axes,
                                 uintptr_t lse,
                                 uintptr_t tickets) {
  launch::FineForward call;
  call.q = sequence(q);
  call.k = sequence(k);
  call.v = sequence(v);
  call.out = sequence(out);
  call.gates = gates;
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
  call.query_axes = pointer<const int>(query_axes);
  call.lse = pointer<float>(lse);
  call.tickets = pointer<int>(tickets);
  return call;
}

launch::FineBackward backward_call(const Views& q,
                                   const Views& k,
                                   const Views& v,
                                   const Views& grad_out,
                                   const Views& grad_q,
                                   const Views& grad_k,
                                   const Views& grad_v,
                                   const View& whole_out,
                                   const View& whole_gradient,
                                   const launch::Gates& gates,
                                   const View& whole_grad_out,
                                   uintptr_t grad_gate_fine,
                                   uintptr_t grad_gate_coarse,
                                   uintptr_t grad_coarse,
                                   const GridNumbers& grid,
                                   const GridNumbers& kv_grid,
                                   int batch,
                                   int heads,
                                   int kv_heads,
                                   int head_dim,
                                   bool bf16,
                                   float scale,
                                   uintptr_t selected,
                                   uintptr_t transposed,
                                   uintptr_t query_axes,
                                   uintptr_t key_axes,
                                   uintptr_t order,
                                   uintptr_t query_text_rows,
                                   uintptr_t key_text_rows,
                                   const std::array<uintptr_t, 3>& grad_means,
                                   uintptr_t lse,
                                   uintptr_t grad_lse,
                                   uintptr_t tickets,
                                   uintptr_t row_stats) {
  launch::FineBackward call;
  call.q = sequence(q);
  call.k = sequence(k);
  call.v = sequence(v);
  call.grad_out = sequence(grad_out);
  call.grad_q = sequence(grad_q);
  call.grad_k = sequence(grad_k);
  call.grad_v = sequence(grad_v);
  call.whole_out = view(whole_out);
  call.whole_gradient = view(whole_gradient);
  call.gates = gates;
  call.whole_grad_out = view(whole_grad_out);
  call.grad_gate_fine = pointer<void>(grad_gate_fine);
  call.grad_gate_coarse = pointer<void>(grad_gate_coarse);
  call.grad_coarse = pointer<float>(grad_coarse);
  call.grid = checked_grid(grid);
  call.kv_grid = checked_grid(kv_grid);
  call.batch = batch;
  call.heads = heads;
  call.kv_heads = kv_heads;
  call.head_dim = head_dim;
  call.element = bf16 ? launch::ElementType::Bf16 : launch::ElementType::Fp16;
  call.scale = scale;
  call.selected = pointer<const uint32_t>(selected);
  call.transposed = pointer<const uint32_t>(transposed);
  call.query_axes = pointer<const int>(query_axes);
  call.key_axes = pointer<const int>(key_axes);
  call.order = pointer<const int>(order);
  call.query_text_rows = pointer<const uint64_t>(query_text_rows);
  call.key_text_rows = pointer<const uint64_t>(key_text_rows);
  call.grad_q_means = pointer<const float>(grad_means[0]);
  call.grad_k_means = pointer<const float>(grad_means[1]);
  call.grad_v_means = pointer<const float>(grad_means[2]);
  call.lse = pointer<const float>(lse);
  call.grad_lse = pointer<const float>(grad_lse);
  call.tickets = pointer<int>(tickets);
  call.row_stats = pointer<void>(row_stats);
  return call;
}

launch::BitmapTranspose transpose_call(uintptr_t from,
                                       uintptr_t to,
                                       uintptr_t counts,
                                       int bitmaps,
                                       int rows,
                                       int columns) {
  return {pointer<const uint32_t>(from),
          pointer<uint32_t>(to),
          pointer<int>(counts),
          bitmaps,
          rows,
          columns};
}

launch::AxisChoice axis_call(uintptr_t rows,
                             uintptr_t axes,
                             int batch,
                             int heads,
                             int groups,
                             int words,
                             const std::array<int, 3>& tiles) {
  return {pointer<const uint32_t>(rows), pointer<int>(axes), batch, heads, groups, words,
          {tiles[0], tiles[1], tiles[2]}};
}

launch::ColumnOrder order_call(uintptr_t counts,
                               uintptr_t axes,
                               uintptr_t order,
                               int batch,
                               int heads,
                               int kv_heads,
                               int columns,
                               int text_tiles,
                               int layers) {
  return {pointer<const int>(counts),
          pointer<const int>(axes),
          pointer<int>(order),
          batch,
          heads,
          kv_heads,
          columns,
          text_tiles,
          layers};
}

}  // namespace

void bind_fine(py::module_& m) {
  py::class_<launch::Gates>(m, "Gates", "The gates of a call; with zeros for those not there.")
      .def(py::init(&make_gates), py::kw_only(), py::arg("fine"), py::arg("coarse"),
           py::arg("coarse_rows"));

  py::class_<launch::FineForward>(m, "FineForward", "One call of the forward kernel.")
      .def(py::init(&forward_call), py::kw_only(), py::arg("q"), py::arg("k"), py::arg("v"),
           py::arg("out"), py::arg("gates"), py::arg("grid"), py::arg("kv_grid"), py::arg("batch"),
           py::arg("heads"), py::arg("kv_heads"), py::arg("head_dim"), py::arg("bf16"),
           py::arg("scale"), py::arg("selected"), py::arg("query_text_rows"),
           py::arg("key_text_rows"), py::arg("query_axes"), py::arg("lse"), py::arg("tickets"))
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

  py::class_<launch::Combine>(m, "Combine", "gate_fine * fine + gate_coarse * coarse.")
      .def(py::init(&combine_call), py::kw_only(), py::arg("fine"), py::arg("out"),
           py::arg("gates"), py::arg("grid"), py::arg("batch"), py::arg("heads"),
           py::arg("head_dim"), py::arg("bf16"))
      .def(
          "launch",
          [](const launch::Combine& call, int device, uintptr_t stream) {
            raise_if(launch::combine(call, device, pointer<void>(stream)));
          },
          py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>())
      .def(
          "run", [](const launch::Combine& call) { raise_if(launch::combine_on_host(call)); },
          py::call_guard<py::gil_scoped_release>());

  py::class_<launch::FineBackward>(m, "FineBackward", "One call of the backward kernels.")
      .def(py::init(&backward_call), py::kw_only(), py::arg("q"), py::arg("k"), py::arg("v"),
           py::arg("grad_out"), py::arg("grad_q"), py::arg("grad_k"), py::arg("grad_v"),
           py::arg("whole_out"), py::arg("whole_gradient"), py::arg("gates"),
           py::arg("whole_grad_out"), py::arg("grad_gate_fine"), py::arg("grad_gate_coarse"),
           py::arg("grad_coarse"), py::arg("grid"), py::arg("kv_grid"), py::arg("batch"),
           py::arg("heads"), py::arg("kv_heads"), py::arg("head_dim"), py::arg("bf16"),
           py::arg("scale"), py::arg("selected"), py::arg("transposed"), py::arg("query_axes"),
           py::arg("key_axes"), py::arg("order"), py::arg("query_text_rows"),
           py::arg("key_text_rows"), py::arg("grad_means"), py::arg("lse"), py::arg("grad_lse"),
           py::arg("tickets"), py::arg("row_stats"))
      .def(
          "launch_rows",
          [](const launch::FineBackward& call, int device, uintptr_t stream) {
            raise_if(launch::backward_rows(call, device, pointer<void>(stream)));
          },
          py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>())
      .def(
          "run_rows",
          [](const launch::FineBackward& call) { raise_if(launch::backward_rows_on_host(call)); },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "launch",
          [](const launch::FineBackward& call, int device, uintptr_t stream) {
            raise_if(launch::fine_backward(call, device, pointer<void>(stream)));
          },
          py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>())
      .def(
          "emulate",
          [](const launch::FineBackward& call, int blocks, unsigned seed) {
            raise_if(launch::fine_backward_emulated(call, blocks, seed));
          },
          py::arg("blocks"), py::arg("seed"), py::call_guard<py::gil_scoped_release>());
  m.attr("KEY_TILES_PER_GROUP") = launch::kKeyTilesPerGroup;

  py::class_<launch::BitmapTranspose>(
      m, "BitmapTranspose",
      "[bitmaps, rows, words(columns)] -> [bitmaps, columns, words(rows)] and the bits of each "
      "row, int32 [bitmaps, columns].")
      .def(py::init(&transpose_call), py::kw_only(), py::arg("source"), py::arg("target"),
           py::arg("counts"), py::arg("bitmaps"), py::arg("rows"), py::arg("columns"))
      .def(
          "launch",
          [](const launch::BitmapTranspose& call, int, uintptr_t stream) {
            raise_if(launch::transpose_bitmaps(call, pointer<void>(stream)));
          },
          py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>())
      .def(
          "run",
          [](const launch::BitmapTranspose& call) {
            raise_if(launch::transpose_bitmaps_on_host(call));
          },
          py::call_guard<py::gil_scoped_release>());

  m.attr("ALONG_W") = kAlongW;
  m.attr("ALONG_T") = kAlongT;
  py::class_<launch::AxisChoice>(
      m, "AxisChoice",
      "Along which axis tiles have more of their rows, [batch, heads, tiles, words], in common: "
      "int32 [batch, groups of heads], ALONG_W or ALONG_T.")
      .def(py::init(&axis_call), py::kw_only(), py::arg("rows"), py::arg("axes"), py::arg("batch"),
           py::arg("heads"), py::arg("groups"), py::arg("words"), py::arg("tiles"))
      .def(
          "launch",
          [](const launch::AxisChoice& call, int, uintptr_t stream) {
            raise_if(launch::choose_axes(call, pointer<void>(stream)));
          },
          py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>())
      .def(
          "run",
          [](const launch::AxisChoice& call) { raise_if(launch::choose_axes_on_host(call)); },
          py::call_guard<py::gil_scoped_release>());

  py::class_<launch::ColumnOrder>(
      m, "ColumnOrder",
      "Groups of neighbouring key tiles by their longest column: int32 [batch, kv_heads, groups] "
      "from counts, int32 [batch, heads, columns].")
      .def(py::init(&order_call), py::kw_only(), py::arg("counts"), py::arg("axes"),
           py::arg("order"), py::arg("batch"), py::arg("heads"), py::arg("kv_heads"),
           py::arg("columns"), py::arg("text_tiles"), py::arg("layers"))
      .def(
          "launch",
          [](const launch::ColumnOrder& call, int, uintptr_t stream) {
            raise_if(launch::order_columns(call, pointer<void>(stream)));
          },
          py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>())
      .def(
          "run",
          [](const launch::ColumnOrder& call) { raise_if(launch::order_columns_on_host(call)); },
          py::call_guard<py::gil_scoped_release>());
}

}  // namespace vsa::bind
