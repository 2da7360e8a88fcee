// SPDX-License-Identifier: Apache-2.0
// What a video that comes chunk by chunk needs in vsa._C: which fields each call has, and what runs
// it.
#include "launch/chunks.h"

#include "bind/fields.h"

namespace vsa::bind {
namespace {

using ChunkDtype = OneOf<launch::Values<launch::Dtype::Bf16, launch::Dtype::Fp16>>;

}  // namespace

void bind_chunks(py::module_& m) {
  using Means = launch::ChunkMeans;
  auto means = bind_struct<Means>(
      m, "ChunkMeans", "Means of the tiles of a chunk, whose keys and values go into a cache.",
      {VSA_FIELD(Means, k), VSA_FIELD(Means, v), VSA_FIELD(Means, queries),
       VSA_FIELD(Means, k_slots, NotNull), VSA_FIELD(Means, v_slots, NotNull),
       VSA_FIELD(Means, k_text), VSA_FIELD(Means, v_text), VSA_FIELD(Means, slot),
       VSA_FIELD(Means, slots, Positive), VSA_FIELD(Means, batch, Positive),
       VSA_FIELD(Means, head_dim, Positive), VSA_FIELD(Means, dtype, ChunkDtype)});
  bind_run<launch::chunk_means, launch::chunk_means_emulated>(means);
  using Reorder = launch::ReorderBitmap;
  auto reorder = bind_struct<Reorder>(
      m, "ReorderBitmap", "Rows of a bitmap with chunks of columns in another order.",
      {VSA_FIELD(Reorder, source, NotNull), VSA_FIELD(Reorder, target, NotNull),
       VSA_FIELD(Reorder, order, NotNull), VSA_FIELD(Reorder, rows, Positive),
       VSA_FIELD(Reorder, columns, Positive), VSA_FIELD(Reorder, per_chunk, Positive)});
  bind_run<launch::reorder_bitmap, launch::reorder_bitmap_emulated>(reorder);
}

}  // namespace vsa::bind
