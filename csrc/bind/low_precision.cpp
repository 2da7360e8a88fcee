// SPDX-License-Identifier: Apache-2.0
// The fine stage in eight bits in vsa._C: which fields each call has, and what runs it.
#include "launch/low_precision.h"

#include "bind/fields.h"
#include "tile/quantised_tile.h"

namespace vsa::bind {
namespace {

struct LowPrecisionHeadDim : OneOf<launch::FineHeadDims> {};
struct LowPrecisionDtype : OneOf<launch::FineDtypes> {};

void bind_statistics(py::module_& m) {
  using Call = launch::ChannelStatistics;
  auto bound = bind_struct<Call>(
      m, kClass<Call>, "What eight bits of keys and values need to know of whole heads.",
      {VSA_FIELD(Call, k, NotNull), VSA_FIELD(Call, v, NotNull), VSA_FIELD(Call, grid),
       VSA_FIELD(Call, text_rows), VSA_FIELD(Call, batch, Positive),
       VSA_FIELD(Call, heads, Positive), VSA_FIELD(Call, head_dim, LowPrecisionHeadDim),
       VSA_FIELD(Call, dtype, LowPrecisionDtype), VSA_FIELD(Call, records, NotNull)});
  bind_run<launch::channel_statistics, launch::channel_statistics_emulated>(bound);
}

void bind_tiles(py::module_& m) {
  using Call = launch::QuantiseTiles;
  auto bound = bind_struct<Call>(
      m, "QuantiseTiles", "Keys and values of some heads in eight bits, images of tiles.",
      {inherited<Call, launch::ChannelStatistics>("statistics"), VSA_FIELD(Call, fp8),
       VSA_FIELD(Call, channels, NotNull), VSA_FIELD(Call, images, NotNull)});
  bind_run<launch::quantise_tiles, launch::quantise_tiles_emulated>(bound);
}

void bind_low_precision_forward(py::module_& m) {
  using Call = launch::LowPrecisionForward;
  auto bound =
      bind_struct<Call>(m, "LowPrecisionForward", "The forward kernel over quantised tiles.",
                        {inherited<Call, launch::FineForward>("forward"), VSA_FIELD(Call, fp8),
                         VSA_FIELD(Call, images, NotNull), VSA_FIELD(Call, channels, NotNull)});
  bind_run<launch::low_precision_forward, launch::low_precision_forward_emulated>(bound);
}

}  // namespace

void bind_low_precision(py::module_& m) {
  bind_statistics(m);
  bind_tiles(m);
  bind_low_precision_forward(m);
  m.def("low_precision_work_tiles", launch::low_precision_work_tiles, py::arg("head_dim"),
        py::arg("tiles"), "Work tiles of a head with so many query tiles.");
  m.def("quantised_tile_bytes", quantised_tile_bytes, py::arg("head_dim"),
        "Bytes of a tile's image.");
  m.attr("CHANNEL_RECORD_BYTES") = launch::kRecordBytes;
}

}  // namespace vsa::bind
