// SPDX-License-Identifier: Apache-2.0
// Bitmaps on a GPU.
#include <cuda_runtime.h>

#include "launch/fine.h"

namespace vsa::launch {
namespace {

constexpr int kWarps = 4;

// A warp transposes 32 columns of a bitmap, 32 rows at a time: lane r comes with row r's word and
// leaves with column r's.
__global__ void __launch_bounds__(kWarps* kWordBits) transpose_kernel(BitmapTranspose p) {
  const int lane = threadIdx.x % kWordBits;
  const int left = (blockIdx.x * kWarps + threadIdx.x / kWordBits) * kWordBits;
  if (left >= p.columns) return;
  const int64_t bitmap = blockIdx.y;
  const int from_words = bitmap::words(p.columns), to_words = bitmap::words(p.rows);
  const uint32_t* from = p.from + bitmap * p.rows * from_words + left / kWordBits;
  const int column = left + lane;
  uint32_t* to = p.to + (bitmap * p.columns + column) * to_words;
  int count = 0;
  for (int word = 0; word < to_words; ++word) {
    const int row = word * kWordBits + lane;
    uint32_t bits = row < p.rows ? __ldg(from + int64_t{row} * from_words) : 0;
    // The rounds of bitmap::transpose_block, each a trade with the lane that is `side` away.
    uint32_t low = 0x0000ffff;
    for (int side = kWordBits / 2; side > 0; side /= 2, low ^= low << side) {
      const uint32_t other = __shfl_xor_sync(~0u, bits, side);
      bits = (lane & side) == 0 ? (bits & low) | (other & low) << side
                                : (bits & ~low) | (other & ~low) >> side;
    }
    count += __popc(bits);
    if (column < p.columns) to[word] = bits;
  }
  if (column < p.columns) p.counts[bitmap * p.columns + column] = count;
}

}  // namespace

std::string transpose_bitmaps(const BitmapTranspose& call, void* stream) {
  if (call.bitmaps == 0) return "";
  const dim3 blocks(ceil_div(bitmap::words(call.columns), kWarps), call.bitmaps);
  transpose_kernel<<<blocks, kWarps * kWordBits, 0, static_cast<cudaStream_t>(stream)>>>(call);
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return "";
  return std::string("the transpose of bitmaps was not launched: ") + cudaGetErrorString(error);
}

}  // namespace vsa::launch
