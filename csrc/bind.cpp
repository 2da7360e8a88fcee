// SPDX-License-Identifier: Apache-2.0
// vsa._C: numbers, pointers and a stream handle in; Python objects or an exception out.
#include "bind.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <climits>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "launch/launch.h"
#include "prim/facts.h"

namespace py = pybind11;

namespace {

using vsa::Grid;
using vsa::bind::checked_grid;
using vsa::bind::GridNumbers;
using vsa::bind::raise_if;
using vsa::bind::require;
using Words = std::vector<uint32_t>;  // a bitmap, row after row

auto tile_table(const GridNumbers& numbers) {
  const Grid grid = checked_grid(numbers);
  std::vector<std::tuple<int, int, int, unsigned>> places;
  std::vector<uint64_t> masks;
  std::vector<std::array<int, vsa::kTileRows>> tokens;
  for (int tile = 0; tile < grid.num_tiles(); ++tile) {
    const vsa::Place at = grid.place(tile);
    places.emplace_back(at.first.t, at.first.h, at.first.w, at.clip);
    masks.push_back(grid.row_mask(tile));
    auto& rows = tokens.emplace_back();
    for (int row = 0; row < vsa::kTileRows; ++row) rows[row] = grid.token(at, row);
  }
  return std::tuple(places, masks, tokens);
}

std::pair<int, int> tile_and_row(const GridNumbers& numbers, int token) {
  const Grid grid = checked_grid(numbers);
  require(token >= 0 && token < grid.num_tokens(), "token: lies outside the sequence");
  return {grid.tile_of(token), grid.row_of(token)};
}

void device_tile_table(const GridNumbers& numbers,
                       uintptr_t places,
                       uintptr_t masks,
                       uintptr_t tokens,
                       uintptr_t stream) {
  const vsa::launch::TileTable table = {reinterpret_cast<int32_t*>(places),
                                        reinterpret_cast<uint64_t*>(masks),
                                        reinterpret_cast<int32_t*>(tokens)};
  const Grid grid = checked_grid(numbers);
  std::string error;
  {
    py::gil_scoped_release others_may_run;
    error = vsa::launch::device_tile_table(grid, table, reinterpret_cast<void*>(stream));
  }
  raise_if(error);
}

void require_words(const Words& bitmap, int rows, int bits) {
  require(rows >= 0 && bits >= 0, "bitmap: rows and bits must not be negative");
  const size_t expected = size_t(rows) * size_t(vsa::bitmap::words(bits));
  require(bitmap.size() == expected, "bitmap: expected " + std::to_string(expected) +
                                         " words of 32 bits, got " + std::to_string(bitmap.size()));
}

Words pack_bits(const std::vector<int>& set, int bits) {
  require(bits >= 0, "bits: must not be negative");
  Words row(vsa::bitmap::words(bits));
  for (int bit : set) {
    require(bit >= 0 && bit < bits, "set: bit " + std::to_string(bit) + " lies outside the row");
    vsa::bitmap::set(row.data(), bit);
  }
  return row;
}

std::vector<int> unpack_bits(const Words& row, int bits) {
  require_words(row, 1, bits);
  std::vector<int> set;
  for (int bit = vsa::bitmap::next(row.data(), bits, 0); bit < bits;
       bit = vsa::bitmap::next(row.data(), bits, bit + 1))
    set.push_back(bit);
  return set;
}

int count_bits(const Words& row, int bits) {
  require_words(row, 1, bits);
  return vsa::bitmap::count(row.data(), bits);
}

bool test_bit(const Words& row, int bits, int bit) {
  require_words(row, 1, bits);
  require(bit >= 0 && bit < bits, "bit: lies outside the row");
  return vsa::bitmap::test(row.data(), bit);
}

template <auto merge>
Words merge_bits(const Words& a, const Words& b, int bits) {
  require_words(a, 1, bits);
  require_words(b, 1, bits);
  Words out(a.size());
  merge(a.data(), b.data(), bits, out.data());
  return out;
}

Words transpose_bits(const Words& bitmap, int rows, int columns) {
  require_words(bitmap, rows, columns);
  Words out(size_t(columns) * size_t(vsa::bitmap::words(rows)));
  vsa::bitmap::transpose(bitmap.data(), rows, columns, out.data());
  return out;
}

py::dict build_info() {
#if defined(__clang__)
  constexpr const char* compiler = "clang " __clang_version__;
#else
  constexpr const char* compiler = "gcc " __VERSION__;
#endif
  const vsa::launch::CudaPart cuda = vsa::launch::cuda_part();
  py::dict info;
  info["version"] = VSA_VERSION;
  info["compiler"] = compiler;
  info["cuda"] = cuda.built;
  info["cuda_version"] = cuda.built ? py::cast(std::to_string(cuda.version / 1000) + "." +
                                               std::to_string(cuda.version % 1000 / 10))
                                    : py::none();
  info["architectures"] = py::str(cuda.architectures).attr("split")();
  return info;
}

py::tuple device_count() {
  int count = 0;
  const std::string reason = vsa::launch::device_count(&count);
  return py::make_tuple(count, reason);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of vsa. A grid is 8 ints: T, H, W, tile t, h, w, prefix, suffix.";
  m.def("build_info", build_info, "version, compiler, cuda, cuda_version, architectures");
  m.def("device_count", device_count, "-> (CUDA devices, why there are none or '')");

  m.def("tile_table", tile_table, py::arg("grid"),
        "-> (places [tiles] of (t, h, w, clip), row masks [tiles], tokens [tiles][64], -1: none)");
  m.def("tile_and_row", tile_and_row, py::arg("grid"), py::arg("token"),
        "-> (tile, row) of a token, (-1, -1) for text");
  m.def("device_tile_table", device_tile_table, py::arg("grid"), py::arg("places"),
        py::arg("masks"), py::arg("tokens"), py::arg("stream"),
        "tile_table on the device, into int32 [tiles, 4], int64 [tiles] and int32 [tiles, 64]");

  m.def("pack_bits", pack_bits, py::arg("set"), py::arg("bits"), "-> words of one row");
  m.def("unpack_bits", unpack_bits, py::arg("row"), py::arg("bits"), "-> set bits, ascending");
  m.def("count_bits", count_bits, py::arg("row"), py::arg("bits"));
  m.def("test_bit", test_bit, py::arg("row"), py::arg("bits"), py::arg("bit"));
  m.def("unite_bits", merge_bits<vsa::bitmap::unite>, py::arg("a"), py::arg("b"), py::arg("bits"));
  m.def("intersect_bits", merge_bits<vsa::bitmap::intersect>, py::arg("a"), py::arg("b"),
        py::arg("bits"));
  m.def("transpose_bits", transpose_bits, py::arg("bitmap"), py::arg("rows"), py::arg("columns"),
        "[rows][words(columns)] -> [columns][words(rows)], flat");

  vsa::bind::bind_fine(m);
  vsa::bind::bind_routing(m);
}
