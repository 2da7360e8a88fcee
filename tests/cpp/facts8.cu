// SPDX-License-Identifier: Apache-2.0
// 8-bit numbers and products as a GPU computes them, for tests/kernels/test_facts8.py: one product
// of 64 x 64 over 32 bytes per block, its A operand in registers and its B operand in rows of 64
// bytes, and conversions. All pointers are the device's; every function waits for its kernel and
// returns the runtime's error, 0 for none.
#include "prim/sm90.h"
#include "tile/byte_tile.h"

namespace {

using namespace vsa;  // NOLINT: the words of the kernels

__device__ float number(float x, int) { return x; }
__device__ float number(int x, int) { return static_cast<float>(x); }
__device__ float number(uint32_t x, int which) {
  return which == 0 ? widen_low<Fp16>(x) : widen_high<Fp16>(x);
}

// a [64, 32], b [64, 32], d [64, 64] of every block: d += a b^T
template <class Element, class T>
__global__ void __launch_bounds__(kWarpgroupThreads)
    one_step(const uint8_t* a, const uint8_t* b, float* d) {
  __shared__ ByteTile<64, kHalfRowBytes> tile;
  a += blockIdx.x * 64 * kReduction8;
  b += blockIdx.x * 64 * kReduction8;
  d += blockIdx.x * 64 * 64;
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < 64 * kHalfRowBytes; i += kWarpgroupThreads) {
    const int row = i / kHalfRowBytes, byte = i % kHalfRowBytes;
    tile.bytes[tile.place(row, byte)] = byte < kReduction8 ? b[row * kReduction8 + byte] : 0;
  }
  fence_async_proxy();
  __syncthreads();
  Operand8<32> left;
  Fragment<64, T> sums;
  for (int r = 0; r < 4; ++r)
    left.x[r] = *reinterpret_cast<const uint32_t*>(a + four_row(thread, r) * kReduction8 +
                                                   four_column(thread, r));
  constexpr int kNumbers = std::is_same_v<T, Fp16> ? 2 : 1;
  const auto place = [&](int i) {
    return accumulator_row(thread, i) * 64 + accumulator_column(thread, i);
  };
  for (int i = 0; i < 32; i += kNumbers) {
    if constexpr (kNumbers == 2)
      sums.x[i / 2] = pack<Fp16>(d[place(i)], d[place(i + 1)]);
    else
      sums.x[i] = static_cast<decltype(+sums.x[0])>(d[place(i)]);
  }
  wgmma_fence();
  wgmma8<Element>(sums, left, 0, bytes_descriptor<kHalfRowBytes>(tile.address(), 0), true);
  wgmma_commit();
  wgmma_wait<0>(sums);
  for (int i = 0; i < 32; ++i) d[place(i)] = number(sums.x[i / kNumbers], i % kNumbers);
}

// which: 0 E4m3, 1 S8, 2 codes linear in the exponent
__global__ void convert(const float* x, int n, int which, uint32_t* fours) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  x += i * 4;
  fours[i] = which == 0   ? pack8<E4m3>(x[0], x[1], x[2], x[3])
             : which == 1 ? pack8<S8>(x[0], x[1], x[2], x[3])
                          : low_bytes(line_codes(x[0], x[1]), line_codes(x[2], x[3]));
}

int done() {
  const cudaError_t error = cudaGetLastError();
  return error != cudaSuccess ? error : cudaDeviceSynchronize();
}

}  // namespace

// which: 0 e4m3 with fp32 sums, 1 e4m3 with halves, 2 s8
extern "C" int device_one_step(int which,
                               int blocks,
                               const uint8_t* a,
                               const uint8_t* b,
                               float* d) {
  if (which == 0) one_step<E4m3, float><<<blocks, kWarpgroupThreads>>>(a, b, d);
  if (which == 1) one_step<E4m3, Fp16><<<blocks, kWarpgroupThreads>>>(a, b, d);
  if (which == 2) one_step<S8, int><<<blocks, kWarpgroupThreads>>>(a, b, d);
  return done();
}
extern "C" int device_convert(const float* x, int n, int which, uint32_t* fours) {
  convert<<<(n + 127) / 128, 128>>>(x, n, which, fours);
  return done();
}
