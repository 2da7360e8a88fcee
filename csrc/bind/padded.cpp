// SPDX-License-Identifier: Apache-2.0
// What padded tiles need in vsa._C: which fields each call has, and what runs it.
#include "launch/padded.h"

#include "bind/fields.h"

namespace vsa::bind {

void bind_padded(py::module_& m) {
  using Kept = launch::KeptTiles;
  auto kept = bind_struct<Kept>(
      m, "KeptTiles", "What callers keep, as a bitmap of tiles of 64 slots.",
      {VSA_FIELD(Kept, lists), VSA_FIELD(Kept, map), VSA_FIELD(Kept, words),
       VSA_FIELD(Kept, counts), VSA_FIELD(Kept, sizes), VSA_FIELD(Kept, kv_sizes, NotNull),
       VSA_FIELD(Kept, bitmap, NotNull), VSA_FIELD(Kept, lengths), VSA_FIELD(Kept, part_sizes),
       VSA_FIELD(Kept, rows, Positive), VSA_FIELD(Kept, query_tiles, Positive),
       VSA_FIELD(Kept, columns, Positive), VSA_FIELD(Kept, width, NotNegative),
       VSA_FIELD(Kept, parts, Positive)});
  bind_run<launch::keep_tiles, launch::keep_tiles_emulated>(kept);
  using Empty = launch::HideEmpty;
  auto empty = bind_struct<Empty>(
      m, "HideEmpty", "Scores of key tiles without a token, which nobody may choose.",
      {VSA_FIELD(Empty, scores, NotNull), VSA_FIELD(Empty, kv_sizes, NotNull),
       VSA_FIELD(Empty, rows, Positive), VSA_FIELD(Empty, columns, Positive)});
  bind_run<launch::hide_empty, launch::hide_empty_emulated>(empty);
}

}  // namespace vsa::bind
