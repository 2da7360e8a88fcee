// SPDX-License-Identifier: Apache-2.0
// Bitmaps on a GPU.
#include "launch/cuda_launch.h"
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
  const uint32_t* from = p.source + bitmap * p.rows * from_words + left / kWordBits;
  const int column = left + lane;
  uint32_t* to = p.target + (bitmap * p.columns + column) * to_words;
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

// A block decides for a group of heads, a warp sums up a sample, lanes read words side by side.
__global__ void __launch_bounds__(AxisChoice::kSamples* kWordBits) axis_kernel(AxisChoice p) {
  static_assert(AxisChoice::kSamples == kWordBits, "one warp adds up what the samples say");
  __shared__ AxisChoice::Answer answers[AxisChoice::kSamples];
  const int lane = threadIdx.x % kWordBits, sample = threadIdx.x / kWordBits;
  const int group = static_cast<int>(blockIdx.x), sharing = p.sharing();
  for (int i = static_cast<int>(threadIdx.x); group == 0 && i < p.count; i += blockDim.x)
    p.counters[i] = 0;
  AxisChoice::Sample found;
  for (int i = 0; i < sharing; ++i)
    for (int word = lane; word < p.words; word += kWordBits)
      found.add(p.look(group * sharing + i, sample, word));
  found.length = __reduce_add_sync(~0u, found.length);
  found.shared = __reduce_add_sync(~0u, found.shared);
  found.longer_t = __reduce_add_sync(~0u, found.longer_t);
  found.longer_w = __reduce_add_sync(~0u, found.longer_w);
  if (lane == 0) answers[sample] = p.answer(found, sample);
  __syncthreads();
  if (sample != 0) return;
  AxisChoice::Answer all = answers[lane];
  all.along_t = __reduce_add_sync(~0u, all.along_t);
  all.backwards = __reduce_add_sync(~0u, all.backwards);
  if (lane == 0) p.axes[group] = p.axis(all);
}

constexpr int kSortThreads = 256;

// The sum over all threads of a block.
template <class T>
VSA_DEVICE T sum_of_block(T own, T* total) {
  if (threadIdx.x == 0) *total = 0;
  __syncthreads();
  atomicAdd(total, own);
  __syncthreads();
  const T all = *total;
  __syncthreads();
  return all;
}

// How many groups of a head are long ones, by one block of it.
VSA_DEVICE void count_long_ones(const GroupSort& p, int head) {
  __shared__ unsigned long long length;
  __shared__ int count;
  GroupSort::Sum all;
  for (int group = static_cast<int>(threadIdx.x); group < p.groups(); group += kSortThreads)
    all.add(p.length(head, group));
  all.length = sum_of_block(static_cast<unsigned long long>(all.length), &length);
  all.groups = sum_of_block(all.groups, &count);
  int found = 0;
  for (int group = static_cast<int>(threadIdx.x); group < p.groups(); group += kSortThreads)
    found += GroupSort::is_long(p.length(head, group), all) ? 1 : 0;
  found = sum_of_block(found, &count);
  if (threadIdx.x == 0) atomicMax(p.long_ones, p.first_groups(found));
}

// Each thread finds the place of one group: how many of its head's groups come before it.
__global__ void __launch_bounds__(kSortThreads) sort_kernel(GroupSort p) {
  __shared__ int lengths[kSortThreads];
  const int head = static_cast<int>(blockIdx.y), groups = p.groups();
  const int mine = static_cast<int>(blockIdx.x) * kSortThreads + static_cast<int>(threadIdx.x);
  const int length = mine < groups ? p.length(head, mine) : 0;
  int place = 0;
  for (int first = 0; first < groups; first += kSortThreads) {
    const int left = groups - first < kSortThreads ? groups - first : kSortThreads;
    const int other = static_cast<int>(threadIdx.x);
    if (other < left) lengths[other] = p.length(head, first + other);
    __syncthreads();
    for (int i = 0; i < left; ++i)
      place += lengths[i] > length || (lengths[i] == length && first + i < mine);
    __syncthreads();
  }
  if (mine < groups) p.order[int64_t{head} * groups + place] = mine;
  if (blockIdx.x == 0) count_long_ones(p, head);
}

}  // namespace

std::string transpose_bitmaps(const BitmapTranspose& call, int device, void* stream) {
  return launch_on(device, stream, "the transpose of bitmaps", [&](cudaStream_t stream) {
    const dim3 blocks(ceil_div(bitmap::words(call.columns), kWarps), call.bitmaps);
    transpose_kernel<<<blocks, kWarps * kWordBits, 0, stream>>>(call);
    return cudaGetLastError();
  });
}

std::string choose_axes(const AxisChoice& call, int device, void* stream) {
  return launch_on(device, stream, "the choice of axes", [&](cudaStream_t stream) {
    const int blocks = call.batch * call.groups;
    axis_kernel<<<blocks, AxisChoice::kSamples * kWordBits, 0, stream>>>(call);
    return cudaGetLastError();
  });
}

std::string sort_groups(const GroupSort& call, int device, void* stream) {
  return launch_on(device, stream, "the order of tiles", [&](cudaStream_t stream) {
    const dim3 blocks(ceil_div(call.groups(), kSortThreads), call.batch * call.head_groups);
    sort_kernel<<<blocks, kSortThreads, 0, stream>>>(call);
    return cudaGetLastError();
  });
}

}  // namespace vsa::launch
