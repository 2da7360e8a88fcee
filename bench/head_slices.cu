// SPDX-License-Identifier: Apache-2.0
// How a low-precision forward should take its heads: a JSON line per way. Wan 1.3B at 480p and LTX,
// random lists of one tile in eight, int8, random numbers.
//
//   nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -Icsrc -o head_slices
//        bench/head_slices.cu && ./head_slices
//
// chain      slices after each other, as vsa has them: images of a slice, then its forward
// lanes      as many chains as there are streams, each in a room of its own: while the last blocks
//            of one forward run, the next one's begin; the same memory as one slice of all of them
// statistics the pass over channels, by how many tiles a warp takes
// images     the pass that makes images, for all heads
// native     the forward in bf16
//
// Times are of events around calls back to back, the median of nine; check compares all ways'
// outputs with those of the first, bit by bit.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "checked.h"
#include "launch/low_precision_params.h"
#include "launch/tensor_core_launch.h"

namespace vsa::launch {
namespace {

using bench::allocate, bench::check;

constexpr int kWarps = 8, kBlocks = 3;  // as launch/low_precision.cu

template <class Kernel>
__global__ void __launch_bounds__(kWarps* kWarpThreads, kBlocks)
    warps_kernel(const __grid_constant__ QuantiseTilesParams params) {
  const int own = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpThreads, 0);
  const int64_t warp = int64_t{blockIdx.x} * kWarps + own;
  if (warp < Kernel::warps(params)) Kernel::run(params, warp);
}
template <class Kernel>
void launch_warps(const QuantiseTilesParams& params, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((Kernel::warps(params) + kWarps - 1) / kWarps);
  warps_kernel<Kernel><<<blocks, kWarps * kWarpThreads, 0, stream>>>(params);
  check(cudaGetLastError(), "a launch");
}

// About N(0,1), by the sum of four uniform numbers.
__global__ void fill_randomly(uint16_t* to, size_t count, uint32_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    uint32_t x = static_cast<uint32_t>(i) * 2654435761u ^ seed;
    float sum = 0;
    for (int j = 0; j < 4; ++j) {
      x ^= x >> 16, x *= 0x7feb352du, x ^= x >> 15, x *= 0x846ca68bu, x ^= x >> 16;
      sum += static_cast<float>(x) * 0x1p-32f - 0.5f;
    }
    to[i] = static_cast<uint16_t>(__float_as_uint(sum * 1.7320508f) >> 16);
  }
}

constexpr int kMostLanes = 4, kMostSlices = 64, kRounds = 9, kCalls = 12;

template <int D>
class Layer {
 public:
  using Image = QuantisedTile<D>;
  using Low = vsa::LowPrecisionForward<LowPrecisionForwardConfig<Bf16, D, S8>>;
  using Native = vsa::FineForward<FineForwardConfig<Bf16, D>>;
  using Statistics = vsa::ChannelStatistics<Bf16, D>;
  using Images = vsa::QuantiseTiles<Bf16, D, S8>;

  Layer(const char* name, Axes video, int heads)
      : name_(name), grid_(make_grid(video, {4, 4, 4})), heads_(heads) {
    const size_t numbers = size_t(grid_.num_tokens()) * heads * D;
    for (uint16_t** x : {&q_, &k_, &v_, &out_}) *x = allocate<uint16_t>(numbers);
    first_ = allocate<uint16_t>(numbers);
    uint32_t seed = 1;
    for (uint16_t* x : {q_, k_, v_}) fill_randomly<<<1024, 256>>>(x, numbers, seed++);
    lse_ = allocate<float>(size_t(heads) * grid_.num_tokens());
    axes_ = allocate<int>(heads);
    counters_ = allocate<int>(kMostSlices);
    channels_ = allocate<float>(size_t(heads) * 2 * D);
    images_ = allocate<unsigned char>(size_t(heads) * grid_.num_tiles() * Image::kImageBytes);
    records_ = allocate<HeadRecord<D>>(heads);
    draw_lists();
    for (cudaStream_t& stream : lanes_)
      check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "a stream");
    for (cudaEvent_t& event : joins_)
      check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "an event");
    check(cudaDeviceSynchronize(), "making the layer");
  }

  void measure() {
    const size_t bytes = size_t(grid_.num_tokens()) * heads_ * D * 2;
    const auto slices = [&](const char* way, std::vector<int> sizes, int lanes) {
      std::string text;
      for (const int size : sizes) text += (text.empty() ? "" : ",") + std::to_string(size);
      time(std::string(way) + " " + text + " x" + std::to_string(lanes),
           [&] { run(sizes, lanes); });
      check(cudaDeviceSynchronize(), "a call");
      if (!known_) check(cudaMemcpy(first_, out_, bytes, cudaMemcpyDefault), "keeping the output");
      known_ = true;
      std::vector<uint16_t> mine(bytes / 2), wanted(bytes / 2);
      check(cudaMemcpy(mine.data(), out_, bytes, cudaMemcpyDefault), "reading");
      check(cudaMemcpy(wanted.data(), first_, bytes, cudaMemcpyDefault), "reading");
      if (mine != wanted) std::printf("{\"way\": \"%s %s\", \"WRONG\": true}\n", way, text.c_str());
    };
    const auto even = [&](int size) {
      std::vector<int> sizes(heads_ / size, size);
      if (heads_ % size) sizes.push_back(heads_ % size);
      return sizes;
    };
    slices("chain", {heads_}, 1);
    for (const int size : D == 128 ? std::vector{4, 3, 2} : std::vector{10, 8, 7})
      slices("chain", even(size), 1);
    for (const int size : D == 128 ? std::vector{2} : std::vector{5, 4})
      slices("lanes", even(size), 2);
    slices("lanes", even(D == 128 ? 1 : 3), 3);
    slices("lanes", even(D == 128 ? 1 : 2), 4);
    for (const int together : {1, 2, 3, 4, 8})
      time("statistics " + std::to_string(together), [&] { statistics(together); });
    time("images", [&] { make_images(0, heads_, images_, nullptr); });
    time("native", [&] { native(); });
  }

 private:
  void draw_lists() {
    const int tiles = grid_.num_tiles(), words = bitmap::words(tiles), kept = (tiles + 4) / 8;
    std::vector<uint32_t> bits(size_t(heads_) * tiles * words);
    std::vector<int> order(tiles);
    for (int i = 0; i < tiles; ++i) order[i] = i;
    std::mt19937 rng(7);
    for (size_t row = 0; row < size_t(heads_) * tiles; ++row)
      for (int i = 0; i < kept; ++i) {
        std::swap(order[i], order[i + rng() % (tiles - i)]);
        bits[row * words + order[i] / 32] |= 1u << order[i] % 32;
      }
    bitmap_ = allocate<uint32_t>(bits.size());
    check(cudaMemcpy(bitmap_, bits.data(), bits.size() * 4, cudaMemcpyDefault), "lists");
  }

  QuantiseTilesParams quantise_params(int first, int heads) const {
    QuantiseTilesParams p{};
    const auto tokens = [&](const uint16_t* x) {
      return TokensToQuantise{x + first * D, 0, D, heads_ * D};
    };
    p.k = tokens(k_);
    p.v = tokens(v_);
    p.keys = tiled(grid_, nullptr);
    p.batch = 1;
    p.heads = heads;
    p.records = records_ + first;
    p.channels = channels_ + size_t(first) * 2 * D;
    return p;
  }
  void statistics(int together) {
    check(cudaMemsetAsync(records_, 0, sizeof(HeadRecord<D>) * heads_), "clearing");
    QuantiseTilesParams p = quantise_params(0, heads_);
    p.together = together;
    launch_warps<Statistics>(p, nullptr);
  }
  void make_images(int first, int heads, unsigned char* room, cudaStream_t stream) {
    QuantiseTilesParams p = quantise_params(first, heads);
    p.images = room;
    launch_warps<Images>(p, stream);
  }

  template <class Call>
  Call call(int first, int heads, int* counter) const {
    Call call{};
    const int words = bitmap::words(grid_.num_tiles());
    const auto view = [&](uint16_t* x) {
      return SequenceView{{x + first * D, 0, int64_t{heads_} * D, D}, {}, {}};
    };
    call.grid = call.kv_grid = grid_;
    call.batch = 1;
    call.heads = call.kv_heads = heads;
    call.head_dim = D;
    call.dtype = Dtype::Bf16;
    call.scale = 1 / std::sqrt(static_cast<float>(D));
    call.bitmap = bitmap_ + size_t(first) * grid_.num_tiles() * words;
    call.query_axes = axes_ + first;
    call.q = view(q_), call.k = view(k_), call.v = view(v_), call.out = view(out_);
    call.lse = lse_ + size_t(first) * grid_.num_tokens();
    call.tile_counter = counter;
    return call;
  }
  void forward(int first, int heads, unsigned char* room, int* counter, cudaStream_t stream) {
    auto asked = call<LowPrecisionForward>(first, heads, counter);
    asked.images = room;
    asked.channels = channels_ + size_t(first) * 2 * D;
    typename Low::Params params{};
    check(make_params(params, asked, encode));
    check(launch_persistent<Low>(params, params.queries, heads, 0, stream), "the forward");
  }
  void native() {
    check(cudaMemsetAsync(counters_, 0, sizeof(int)), "clearing");
    typename Native::Params params{};
    check(make_params(params, call<FineForward>(0, heads_, counters_), encode));
    check(launch_persistent<Native>(params, params.queries, heads_, 0, nullptr), "native");
  }

  // Slice i is done by lane i % lanes, in its part of the room.
  void run(const std::vector<int>& sizes, int lanes) {
    check(cudaMemsetAsync(counters_, 0, sizeof(int) * kMostSlices), "clearing");
    statistics(3);
    if (lanes > 1) join(nullptr, lanes, true);
    int first = 0;
    for (size_t i = 0; i < sizes.size(); ++i) {
      const int lane = static_cast<int>(i) % lanes;
      const size_t room = size_t(lane) * sizes[0] * grid_.num_tiles() * Image::kImageBytes;
      const cudaStream_t stream = lanes == 1 ? nullptr : lanes_[lane];
      make_images(first, sizes[i], images_ + room, stream);
      forward(first, sizes[i], images_ + room, counters_ + i, stream);
      first += sizes[i];
    }
    if (lanes > 1) join(nullptr, lanes, false);
  }
  void join(cudaStream_t main, int lanes, bool begin) {
    if (begin) check(cudaEventRecord(joins_[kMostLanes], main), "an event");
    for (int lane = 0; lane < lanes; ++lane) {
      if (!begin) check(cudaEventRecord(joins_[lane], lanes_[lane]), "an event");
      check(begin ? cudaStreamWaitEvent(lanes_[lane], joins_[kMostLanes])
                  : cudaStreamWaitEvent(main, joins_[lane]),
            "waiting");
    }
  }

  void time(const std::string& way, const std::function<void()>& call) {
    cudaEvent_t begin, end;
    check(cudaEventCreate(&begin), "an event");
    check(cudaEventCreate(&end), "an event");
    std::vector<float> found;
    for (int round = -1; round < kRounds; ++round) {
      check(cudaEventRecord(begin), "an event");
      for (int i = 0; i < kCalls; ++i) call();
      check(cudaEventRecord(end), "an event");
      check(cudaEventSynchronize(end), way.c_str());
      float ms = 0;
      check(cudaEventElapsedTime(&ms, begin, end), "a time");
      if (round >= 0) found.push_back(ms / kCalls);
    }
    std::sort(found.begin(), found.end());
    std::printf("{\"layer\": \"%s\", \"way\": \"%s\", \"ms\": %.4f, \"least\": %.4f}\n", name_,
                way.c_str(), found[kRounds / 2], found[0]);
    std::fflush(stdout);
  }

  const char* name_;
  const Grid grid_;
  const int heads_;
  uint16_t *q_, *k_, *v_, *out_, *first_;
  bool known_ = false;
  float *lse_, *channels_;
  int *axes_, *counters_;
  uint32_t* bitmap_;
  unsigned char* images_;
  HeadRecord<D>* records_;
  cudaStream_t lanes_[kMostLanes];
  cudaEvent_t joins_[kMostLanes + 1];
};

}  // namespace
}  // namespace vsa::launch

int main() {
  vsa::launch::Layer<128>("wan-1.3b-480p", {21, 30, 52}, 12).measure();
  vsa::launch::Layer<64>("ltx-video", {21, 16, 22}, 32).measure();
}
