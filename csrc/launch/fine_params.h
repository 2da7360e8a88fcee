// SPDX-License-Identifier: Apache-2.0
// From a call to kernel parameters, the same for both machines.
#pragma once
#include <cmath>
#include <type_traits>

#include "kernels/fine_forward.h"
#include "launch/tensor_map.h"

namespace vsa::launch {

inline TiledSequence tiled(const Grid& grid, const uint64_t* text_rows) {
  return {grid, ceil_div(grid.prefix, kTileRows) + ceil_div(grid.suffix, kTileRows), text_rows};
}

template <class Encode>
std::string make_params(FineForwardParams& p, const FineForward& call, Encode encode) {
  p.queries = tiled(call.grid, call.query_text_rows);
  p.keys = tiled(call.kv_grid, call.key_text_rows);
  p.selected = call.selected;
  p.lse = call.lse;
  p.batch = call.batch;
  p.heads = call.heads;
  p.kv_heads = call.kv_heads;
  p.scale = call.scale * static_cast<float>(M_LOG2E);
  struct Part {
    const char* name;
    TokenTensor& to;
    const SequenceView& from;
    const Grid& grid;
    int heads;
  };
  for (const Part& part : {Part{"q", p.q, call.q, call.grid, call.heads},
                           Part{"k", p.k, call.k, call.kv_grid, call.kv_heads},
                           Part{"v", p.v, call.v, call.kv_grid, call.kv_heads},
                           Part{"out", p.out, call.out, call.grid, call.heads}}) {
    const std::string error =
        make_tensor(part.to, part.from, part.grid, call.batch, part.heads, call.head_dim, encode);
    if (!error.empty()) return std::string(part.name) + " cannot be addressed by TMA: " + error;
  }
  return "";
}

// fn(Config) for the configuration that a call needs; false if there is none.
template <class Fn>
bool with_config(const FineForward& call, Fn fn) {
  const auto with_element = [&](auto element) {
    using Element = decltype(element);
    if (call.head_dim == 64) return fn(FineForwardConfig<Element, 64>{}), true;
    if (call.head_dim == 128) return fn(FineForwardConfig<Element, 128>{}), true;
    return false;
  };
  return call.element == ElementType::Bf16 ? with_element(Bf16{}) : with_element(Fp16{});
}

constexpr const char* kNoConfig = "head_dim must be 64 or 128 for the fine kernels";

}  // namespace vsa::launch
