// SPDX-License-Identifier: Apache-2.0
// The tail as plain functions: what Python passes, in; an error sentence, out. The passes go with
// calls of the fine stage: the forward after its forward, the means of the backward before its
// backward, the queries after that.
#pragma once
#include <cstdint>
#include <string>

#include "launch/fine.h"

namespace vsa::launch {

// Means of the keys' tiles as the kernels read them.
struct TailKeys {
  // [batch, kv_heads, n_k, head_dim], 16 bits, contiguous; k_low is what k has lost
  const void *k = nullptr, *k_low = nullptr, *v = nullptr;
  const float* bias = nullptr;  // [n_k up to a multiple of 64] log2 of tiles' sizes
};

// Makes them.
struct RoundMeans {
  const float *k_means, *v_means;  // [batch, kv_heads, n_k, head_dim]
  TailKeys to;
  Grid kv_grid;
  int batch, kv_heads, head_dim;
  Dtype dtype;
};

// out and lse are those of the fine stage alone at first. Without gates; with any, the call has
// them and the fine stage's forward had none.
struct TailForward : FineForward {
  TailKeys tail;
};

// The fine stage's backward with lse and output of the whole softmax.
struct TailBackward : FineBackward {
  TailKeys tail;
  float* parts;  // [splits, 2, batch, kv_heads, n_k, head_dim], written and read
  int splits;
  float *sum_k, *sum_v;  // [batch, kv_heads, n_k, head_dim] gradients of the means
  bool accumulate;       // adds to what they hold
};

// Empty when all went well.
std::string round_means(const RoundMeans& call, int device, void* stream);
std::string round_means_emulated(const RoundMeans& call);
std::string tail_forward(const TailForward& call, int device, void* stream);
std::string tail_forward_emulated(const TailForward& call, int blocks, unsigned seed);
std::string tail_means(const TailBackward& call, int device, void* stream);
std::string tail_means_emulated(const TailBackward& call, int blocks, unsigned seed);
std::string tail_queries(const TailBackward& call, int device, void* stream);
std::string tail_queries_emulated(const TailBackward& call, int blocks, unsigned seed);

}  // namespace vsa::launch
