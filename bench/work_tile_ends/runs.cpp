// Runs of tiles that consumers begin, by list: usage: runs, beside the folder "lists".
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

#include "kernels/schedule/tile_scheduler.h"
#include "prim/host_block.h"
namespace vsa {
struct Case {
  Grid grid;
  TiledSequence rows;
  TokenTensor first{}, second{};
  std::vector<uint32_t> bits;
  int heads;
  std::vector<int> axes;
  std::vector<long> starts, flush, skips;
  long work = 0;
  long loads = 0;
};
template <int R, int W, int L, int F, int S>
struct Run {
  static constexpr int kConsumers = R, kThreads = (1 + R) * kWarpgroupThreads, kProducers = 1,
                       kProducerRegisters = 24, kConsumerRegisters = 24;
  struct Params {
    Case* c;
  };
  struct SharedMemory {
    TileSchedule<R, L> schedule;
  };
  static void init_barriers(SharedMemory& s) { s.schedule.init(kProducers); }
  static void prologue(const Params&, SharedMemory&, int, int) {}
  static void schedule(const Params& p, SharedMemory& s) {
    Case& c = *p.c;
    TileScheduler<R, W, L, F, S> sch(s.schedule, c.rows, c.rows, c.first, c.second);
    WorkList list(c.rows, R, 1, c.heads, c.axes.data());

    for (int i = 0; i < list.size; ++i) {
      auto w = list.work_tile(i, R);
      sch.add(w,
              bitmap_of(c.bits.data(), 0, c.heads, w.head, c.rows.grid.num_tiles(),
                        bitmap::words(c.rows.grid.num_tiles())),
              w.head);
    }
    sch.finish();
  }
  static void produce(const Params& p, SharedMemory& s, int) {
    if (!elect_lane()) return;
    for (int n = 0;; ++n) {
      s.schedule.full[n % 2].wait(n / 2);
      auto c = s.schedule.chunk(n);
      p.c->loads += c.loads;
      s.schedule.empty[n % 2].arrive_one();
      if (c.finished()) break;
    }
  }
  static void consume(const Params& p, SharedMemory& s, int w) {
    long items = 0;
    bool fresh = true;
    for (int n = 0; items < p.c->work; ++n) {
      s.schedule.full[n % 2].wait(n / 2);
      for (int i = 0;; ++i) {
        auto x = s.schedule.steps[n % 2][w][i].get();
        ConsumerStep st = {x.places, x.phases, x.rows};
        if (st.is(ConsumerStep::kFlush)) {
          p.c->flush[w]++;
          fresh = true;
        }
        if (st.is(ConsumerStep::kSkip)) p.c->skips[w]++;
        if (st.is(ConsumerStep::kCompute) && fresh) {
          p.c->starts[w]++;
          fresh = false;
        }
        if (st.is(ConsumerStep::kDone)) {
          ++items;
          fresh = true;
        }
        if (st.is(ConsumerStep::kDone) || st.is(ConsumerStep::kNextChunk)) break;
      }
      s.schedule.empty[n % 2].arrive_all();
    }
  }
};
}  // namespace vsa
using namespace vsa;
template <int R, int W, int L, int F, int S>
void go(const char* file, Axes v, int heads) {
  Case c;
  c.grid = make_grid(v, {4, 4, 4});
  c.rows = TiledSequence{c.grid, 0, nullptr};
  c.heads = heads;
  c.axes.assign(heads, 0);
  c.starts.assign(R, 0);
  c.flush = c.skips = c.starts;
  c.work = WorkList(c.rows, R, 1, heads, c.axes.data()).size;
  c.bits.resize(size_t(heads) * c.grid.num_tiles() * bitmap::words(c.grid.num_tiles()));
  std::ifstream f("lists/" + std::string(file), std::ios::binary);
  f.read((char*)c.bits.data(), c.bits.size() * 4);
  if (!f) {
    std::puts("no file");
    std::exit(1);
  }
  host::run_block<Run<R, W, L, F, S>>({&c}, 0, 1, 1);
  long a = 0, b = 0, k = 0;
  for (int r = 0; r < R; ++r) a += c.starts[r], b += c.flush[r], k += c.skips[r];
  std::printf(
      "%s R%d W%d: work tiles %ld consumers' %ld starts %ld (%.4f each) flushes %ld skips %ld "
      "loads %ld\n",
      file, R, W, c.work, c.work * R, a, double(a) / (c.work * R), b, k, c.loads);
  std::fflush(stdout);
}
int main() {
  go<3, 8, 96, 4, 6>("random-32x32x32-12-64", {32, 32, 32}, 12);
  go<3, 8, 96, 4, 6>("correlated-32x32x32-12-64", {32, 32, 32}, 12);
  go<3, 8, 96, 4, 6>("correlated-32x32x32-12-256", {32, 32, 32}, 12);
  go<3, 16, 96, 4, 6>("random-32x32x32-12-64", {32, 32, 32}, 12);
  go<3, 8, 96, 4, 6>("random-20x48x80-8-150", {20, 48, 80}, 8);
  go<3, 16, 96, 4, 6>("random-20x48x80-8-150", {20, 48, 80}, 8);
  go<3, 31, 96, 4, 6>("random-20x48x80-8-150", {20, 48, 80}, 8);
  go<3, 8, 96, 4, 6>("correlated-20x48x80-8-150", {20, 48, 80}, 8);
  go<4, 8, 64, 11, 11>("random-32x32x32-12-64", {32, 32, 32}, 12);
  go<4, 8, 64, 11, 11>("random-7x22x40-32-14", {7, 22, 40}, 32);
}
