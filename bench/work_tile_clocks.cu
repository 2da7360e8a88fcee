// SPDX-License-Identifier: Apache-2.0
// The fine stage's forward kernel in bf16, timed, and the clocks between the marks that are in it:
// a JSON line.
//
//   work_tile_clocks FOLDER HEAD_DIM HEADS T H W
//
// bench/work_tile_clocks.py compiles this with the headers of csrc as they are, and with a copy in
// which it has put marks; it also writes what is read here. All files hold numbers alone, in the
// machine's order: q, k, v and out are bf16 of [tokens, heads, head_dim], lse is fp32 of
// [heads, tokens], bitmap int32 of [heads, tiles, words], axes int32 of [heads]. out and lse are
// written.
//
//   ms         of a call among calls that follow each other, the median of nine rounds
//   consumers  of a block
//   parts      [clocks, times] of each part of the work, by its number in work_tile_marks.py, of
//              all blocks of one launch; without marks all are 0. The scheduler's parts are not
//              counted: that would cost the consumers' loop four instructions at head_dim 64.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

namespace vsa {

constexpr int kMostParts = 16;

struct Part {
  unsigned long long clocks, times;
};
__device__ Part parts_of_launch[kMostParts];

__device__ void add_to_launch(unsigned long long& sum, unsigned more) {
  atomicAdd(&sum, static_cast<unsigned long long>(more));
}

// Of one consumer, in shared memory: in registers it would spill. All but add are for one thread.
// A mark ends a part, and begins the next one. The first mark ends part 0, whatever it names: what
// comes before the first work tile.
struct ConsumerClocks {
  static constexpr int kParts = 5;
  unsigned last;
  struct {
    unsigned clocks, times;
  } parts[kParts];
  bool begun;

  __device__ void begin() {
    for (auto& part : parts) part = {};
    begun = false;
    last = static_cast<unsigned>(clock());
  }
  __device__ void mark(int part) {
    auto& to = parts[begun ? part : 0];
    const auto now = static_cast<unsigned>(clock());
    to.clocks += now - last;
    ++to.times;
    begun = true;
    last = now;
  }
  __device__ void add() const {
    for (int part = 0; part < kParts; ++part) {
      add_to_launch(parts_of_launch[part].clocks, parts[part].clocks);
      add_to_launch(parts_of_launch[part].times, parts[part].times);
    }
  }
};

// Of the scheduler warp until its first chunk is written.
struct FirstChunkClocks {
  unsigned last = 0;
  bool over = false;

  __device__ void begin() { last = static_cast<unsigned>(clock()); }
  __device__ void mark(int part) {
    if (over) return;
    const auto now = static_cast<unsigned>(clock());
    if (threadIdx.x % warpSize == 0) add_to_launch(parts_of_launch[part].clocks, now - last);
    begin();
  }
  __device__ void end() { over = true; }
};

}  // namespace vsa

#include "checked.h"
#include "launch/fine_params.h"
#include "launch/tensor_core_launch.h"

namespace vsa::launch {
namespace {

constexpr int kRounds = 9;
constexpr float kRoundMs = 40;

using bench::allocate, bench::check;

template <class T>
T* read(const std::string& path, size_t count) {
  std::vector<T> numbers(count);
  const auto bytes = static_cast<std::streamsize>(count * sizeof(T));
  std::ifstream file(path, std::ios::binary);
  if (!file.read(reinterpret_cast<char*>(numbers.data()), bytes) || file.peek() != EOF)
    check(path + " must hold " + std::to_string(bytes) + " bytes, but it does not");
  T* memory = allocate<T>(count);
  check(cudaMemcpy(memory, numbers.data(), count * sizeof(T), cudaMemcpyDefault), "cudaMemcpy");
  return memory;
}
template <class T>
void write(const std::string& path, const T* memory, size_t count) {
  std::vector<T> numbers(count);
  check(cudaMemcpy(numbers.data(), memory, count * sizeof(T), cudaMemcpyDefault), "cudaMemcpy");
  std::ofstream file(path, std::ios::binary);
  if (!file.write(reinterpret_cast<const char*>(numbers.data()),
                  static_cast<std::streamsize>(count * sizeof(T))))
    check(path + " cannot be written");
}

// Milliseconds of a call among so many.
template <class Call>
float time(int calls, Call call) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  check(cudaEventRecord(begin), "cudaEventRecord");
  for (int i = 0; i < calls; ++i) call();
  check(cudaEventRecord(end), "cudaEventRecord");
  check(cudaEventSynchronize(end), "the kernel");
  float ms = 0;
  check(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
  check(cudaEventDestroy(begin), "cudaEventDestroy");
  check(cudaEventDestroy(end), "cudaEventDestroy");
  return ms / static_cast<float>(calls);
}

template <int D>
void measure(const std::string& folder, int heads, Axes video) {
  using Kernel = vsa::FineForward<FineForwardConfig<Bf16, D>>;
  const Grid grid = make_grid(video, {4, 4, 4});
  const int tiles = grid.num_tiles();
  const size_t rows = size_t(grid.num_tokens()) * heads;
  const auto view = [&](uint16_t* x) {
    return SequenceView{{x, 0, int64_t{heads} * D, D}, {}, {}};
  };
  uint16_t* out = allocate<uint16_t>(rows * D);
  FineForward call{};
  call.grid = call.kv_grid = grid;
  call.batch = 1;
  call.heads = call.kv_heads = heads;
  call.head_dim = D;
  call.dtype = Dtype::Bf16;
  call.scale = 1 / std::sqrt(static_cast<float>(D));
  call.bitmap = read<uint32_t>(folder + "/bitmap", size_t(heads) * tiles * bitmap::words(tiles));
  call.query_axes = read<int>(folder + "/axes", heads);
  call.q = view(read<uint16_t>(folder + "/q", rows * D));
  call.k = view(read<uint16_t>(folder + "/k", rows * D));
  call.v = view(read<uint16_t>(folder + "/v", rows * D));
  call.out = view(out);
  call.lse = allocate<float>(rows);
  call.tile_counter = allocate<int>(1);
  typename Kernel::Params params{};
  check(make_params(params, call, encode));
  const auto run = [&] {
    check(cudaMemsetAsync(call.tile_counter, 0, sizeof(int)), "clearing the counter");
    check(launch_persistent<Kernel>(params, params.queries, heads, 0, nullptr), "the launch");
  };

  time(3, run);
  const int calls = std::max(1, static_cast<int>(kRoundMs / time(5, run)));
  time(calls, run);
  std::vector<float> found;
  for (int round = 0; round < kRounds; ++round) found.push_back(time(calls, run));
  std::sort(found.begin(), found.end());

  Part parts[kMostParts] = {};
  check(cudaMemcpyToSymbol(parts_of_launch, parts, sizeof(parts)), "clearing the clocks");
  run();
  check(cudaMemcpyFromSymbol(parts, parts_of_launch, sizeof(parts)), "the marked launch");
  std::printf("{\"ms\": %.5f, \"consumers\": %d, \"parts\": [", found[kRounds / 2],
              Kernel::kConsumers);
  for (int i = 0; i < kMostParts; ++i)
    std::printf("%s[%llu, %llu]", i == 0 ? "" : ", ", parts[i].clocks, parts[i].times);
  std::printf("]}\n");
  write(folder + "/out", out, rows * D);
  write(folder + "/lse", call.lse, rows);
}

}  // namespace
}  // namespace vsa::launch

int main(int count, char** given) {
  const auto number = [&](int i) { return std::atoi(given[i]); };
  if (count != 7 || (number(2) != 64 && number(2) != 128)) {
    std::fprintf(stderr, "usage: %s FOLDER 64|128 HEADS T H W\n", given[0]);
    return 2;
  }
  const vsa::Axes video = {number(4), number(5), number(6)};
  const auto measure = number(2) == 64 ? vsa::launch::measure<64> : vsa::launch::measure<128>;
  measure(given[1], number(3), video);
}
