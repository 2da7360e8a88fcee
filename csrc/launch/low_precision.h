// SPDX-License-Identifier: Apache-2.0
// The fine stage in eight bits as plain functions: what Python passes, in; an error sentence, out.
// Each has a form that launches its kernels on a GPU and one that runs the same source on a CPU.
#pragma once
#include <string>

#include "launch/fine.h"

namespace vsa::launch {

// What eight bits of keys and values need to know of whole heads
// (kernels/coarse/channel_statistics.h).
struct ChannelStatistics {
  TokenView k, v;             // text included; 16-byte aligned
  Grid grid;                  // of the keys
  const uint64_t* text_rows;  // [batch, text tiles], null without text
  int batch, heads, head_dim;
  Dtype dtype;
  void* records;  // [batch, heads, head_dim] of kRecordBytes, for the kernels alone
};

// Keys and values of some heads in eight bits (kernels/coarse/quantise_tiles.h), once their
// records are there.
struct QuantiseTiles : ChannelStatistics {
  bool fp8;         // keys as e4m3, else as int8
  float* channels;  // [batch, heads, 2, head_dim]: means of K, scales of V
  void* images;     // [batch, heads, tiles] of so many bytes as a tile's image has
};

constexpr int kRecordBytes = 16;

// The forward over such tiles; k and v of the call it begins with are not read.
struct LowPrecisionForward : FineForward {
  bool fp8;               // scores of e4m3, else of int8
  const void* images;     // of QuantiseTiles, of the same kind
  const float* channels;  // likewise
};

// Work tiles of a head of so many query tiles: what the forward's blocks take at a time.
int low_precision_work_tiles(int head_dim, int tiles);

std::string channel_statistics(const ChannelStatistics& call, int device, void* stream);
std::string channel_statistics_emulated(const ChannelStatistics& call);
std::string quantise_tiles(const QuantiseTiles& call, int device, void* stream);
std::string quantise_tiles_emulated(const QuantiseTiles& call);
std::string low_precision_forward(const LowPrecisionForward& call, int device, void* stream);
std::string low_precision_forward_emulated(const LowPrecisionForward& call,
                                           int blocks,
                                           unsigned seed);

}  // namespace vsa::launch
