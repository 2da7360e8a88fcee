// SPDX-License-Identifier: Apache-2.0
// The fine stage as plain functions: what Python passes, in; an error sentence, out. One function
// launches the kernels on a GPU, the other runs the very same kernels on the emulator.
#pragma once
#include <cstdint>
#include <string>

#include "prim/facts.h"

namespace vsa::launch {

enum class ElementType { Bf16, Fp16 };

// Tokens of one tensor; strides in elements, channels contiguous.
struct TokenView {
  const void* data = nullptr;  // [batch, tokens, heads, head_dim]
  int64_t batch_stride = 0, token_stride = 0, head_stride = 0;
};

// A sequence's tensor: text that has been copied apart has views of its own.
struct SequenceView {
  TokenView video, prefix, suffix;
};

struct FineForward {
  SequenceView q, k, v, out;
  Grid grid, kv_grid;
  int batch, heads, kv_heads, head_dim;
  ElementType element;
  float scale;
  const uint32_t* selected;         // [batch, heads, n_q, words]
  const uint64_t* query_text_rows;  // [batch, text tiles of the queries], null without text
  const uint64_t* key_text_rows;    // likewise of the keys
  float* lse;                       // [batch, heads, S_q]
};

// Empty when all went well.
std::string fine_forward(const FineForward& call, int device, void* stream);
std::string fine_forward_emulated(const FineForward& call, int blocks, unsigned seed);

}  // namespace vsa::launch
