// SPDX-License-Identifier: Apache-2.0
// From calls to kernel parameters, the same for both machines.
#pragma once
#include "kernels/select/kept_tiles.h"
#include "launch/padded.h"

namespace vsa::launch {

inline std::string make_params(KeptTilesParams& p, const KeptTiles& call) {
  if ((call.lists != nullptr) + (call.map != nullptr) + (call.words != nullptr) != 1)
    return "what rows keep is said by lists, by a map or by a bitmap";
  if (call.lists != nullptr && call.counts == nullptr) return "lists come with their counts";
  if (call.parts != 1 && call.parts != 2 && call.parts != vsa::KeptTiles::kMostParts)
    return "a tile has one, two or four parts";
  if (call.parts > 1 && call.words == call.bitmap) return "a bitmap is not widened where it stands";
  p = {call.lists,       call.map,     call.words,   call.counts,     call.sizes,
       call.kv_sizes,    call.bitmap,  call.lengths, call.part_sizes, call.rows,
       call.query_tiles, call.columns, call.width,   call.parts};
  return "";
}

inline HideEmptyParams params_of(const HideEmpty& call) {
  return {call.scores, call.kv_sizes, call.rows, call.columns};
}

}  // namespace vsa::launch
