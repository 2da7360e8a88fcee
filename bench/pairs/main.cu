// pairs [quick]: forward kernels beside each other
#include <dlfcn.h>
#include <cuda_bf16.h>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <random>
#include <vector>
#include "launch/fine.h"
#include "kernels/schedule/sequence.h"
#include "bench.h"
#include "list.h"
using namespace vsa;
static void check(cudaError_t e, const char* what) {
  if (e == cudaSuccess) return;
  std::printf("%s failed: %s\n", what, cudaGetErrorString(e));
  std::exit(1);
}
template <class T> T* allocate(size_t n) {
  void* p; check(cudaMalloc(&p, n * sizeof(T)), "cudaMalloc"); return static_cast<T*>(p);
}
struct Nvml {
  void* device = nullptr;
  int (*energy)(void*, unsigned long long*) = nullptr;
  int (*clock)(void*, int, unsigned*) = nullptr;
  Nvml() {
    void* lib = dlopen("libnvidia-ml.so.1", RTLD_NOW);
    if (!lib) return;
    auto init = (int (*)())dlsym(lib, "nvmlInit_v2");
    auto by_id = (int (*)(const char*, void**))dlsym(lib, "nvmlDeviceGetHandleByPciBusId_v2");
    energy = (int (*)(void*, unsigned long long*))dlsym(lib, "nvmlDeviceGetTotalEnergyConsumption");
    clock = (int (*)(void*, int, unsigned*))dlsym(lib, "nvmlDeviceGetClockInfo");
    char bus[64]; cudaDeviceGetPCIBusId(bus, 64, 0);
    if (!init || init() != 0 || !by_id || by_id(bus, &device) != 0) device = nullptr;
  }
  double joules() const { unsigned long long mj = 0; return device && energy(device, &mj) == 0 ? mj * 1e-3 : NAN; }
  double mhz() const { unsigned m = 0; return device && clock(device, 1, &m) == 0 ? m : NAN; }
};
__global__ void fill(__nv_bfloat16* x, size_t n, uint32_t seed, float scale, float shift) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < n; i += size_t{gridDim.x} * blockDim.x) {
    uint64_t z = (i + 1) * 0x9E3779B97F4A7C15ull + seed * 0xD1B54A32D192ED03ull;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull; z = (z ^ z >> 27) * 0x94D049BB133111EBull; z ^= z >> 31;
    const float u = ((z >> 40) + 1) * 0x1p-24f, v = (z & 0xffffff) * 0x1p-24f;
    x[i] = __float2bfloat16(scale * sqrtf(-2 * logf(u)) * cospif(2 * v) + shift);
  }
}
struct Layer {
  Grid grid; int heads, d; size_t tokens, elements;
  __nv_bfloat16 *q, *k, *v, *out; float* lse; uint32_t* bits; int *axes, *counter;
  std::vector<uint32_t> host_bits; double pairs, token_pairs;
  Layer(Axes video, int heads, int d) : grid(make_grid(video, {4, 4, 4})), heads(heads), d(d) {
    tokens = grid.num_tokens(); elements = tokens * heads * d;
    q = allocate<__nv_bfloat16>(elements), k = allocate<__nv_bfloat16>(elements), v = allocate<__nv_bfloat16>(elements);
    out = allocate<__nv_bfloat16>(elements), lse = allocate<float>(tokens * heads);
    bits = allocate<uint32_t>(size_t(heads) * grid.num_tiles() * bitmap::words(grid.num_tiles()));
    axes = allocate<int>(heads), counter = allocate<int>(1);
    draw(0);
  }
  ~Layer() { for (void* p : {(void*)q, (void*)k, (void*)v, (void*)out, (void*)lse, (void*)bits, (void*)axes, (void*)counter}) cudaFree(p); }
  // shift: queries and keys around +-shift, so that all scores are negative
  void draw(float shift) {
    fill<<<1024, 256>>>(q, elements, 1, 1, shift), fill<<<1024, 256>>>(k, elements, 2, 1, -shift), fill<<<1024, 256>>>(v, elements, 3, 1, 0);
    check(cudaDeviceSynchronize(), "fill");
    for (auto [to, from] : {std::pair{&hq, q}, {&hk, k}, {&hv, v}}) {
      to->resize(elements); cudaMemcpy(to->data(), from, 2 * elements, cudaMemcpyDeviceToHost);
    }
  }
  void pattern(const std::string& file) {
    const int n = grid.num_tiles(), words = bitmap::words(n);
    std::vector<int> a(heads); host_bits.resize(size_t(heads) * n * words);
    std::ifstream f(file, std::ios::binary);
    f.read((char*)a.data(), 4 * a.size()); f.read((char*)host_bits.data(), 4 * host_bits.size());
    if (!f) { std::printf("cannot read %s\n", file.c_str()); std::exit(1); }
    cudaMemcpy(axes, a.data(), 4 * a.size(), cudaMemcpyHostToDevice);
    cudaMemcpy(bits, host_bits.data(), 4 * host_bits.size(), cudaMemcpyHostToDevice);
    pairs = token_pairs = 0;
    for (int h = 0; h < heads; ++h) for (int i = 0; i < n; ++i) for (int j = 0; j < n; ++j)
      if (bitmap::test(&host_bits[(size_t(h) * n + i) * words], j))
        pairs += 1, token_pairs += double(popcount(grid.row_mask(i))) * popcount(grid.row_mask(j));
  }
  launch::FineForward call() const {
    launch::FineForward c{};
    const auto view = [&](void* p) { return launch::SequenceView{{p, int64_t(elements), int64_t(heads) * d, d}, {}, {}}; };
    c.q = view(q), c.k = view(k), c.v = view(v), c.out = view(out);
    c.grid = c.kv_grid = grid; c.batch = 1; c.heads = c.kv_heads = heads; c.head_dim = d; c.dtype = launch::Dtype::Bf16;
    c.scale = 1 / std::sqrt(float(d)); c.bitmap = bits; c.query_axes = axes; c.lse = lse; c.tile_counter = counter;
    return c;
  }
  // Sampled tokens in fp64: worst relative L2 of a row, and of the log-sum-exp.
  std::vector<uint16_t> hq, hk, hv, ho;
  std::pair<double, double> error() {
    ho.resize(elements); std::vector<float> hl(tokens * heads);
    cudaMemcpy(ho.data(), out, 2 * elements, cudaMemcpyDeviceToHost);
    cudaMemcpy(hl.data(), lse, 4 * hl.size(), cudaMemcpyDeviceToHost);
    const auto f = [](uint16_t b) { uint32_t w = uint32_t(b) << 16; float x; std::memcpy(&x, &w, 4); return double(x); };
    const int n = grid.num_tiles(), words = bitmap::words(n);
    std::mt19937 rng(7); double worst = 0, worst_lse = 0;
    std::vector<int> tile_of(tokens); for (size_t j = 0; j < tokens; ++j) tile_of[j] = grid.tile_of(int(j));
    for (int s = 0; s < 48; ++s) {
      const int h = rng() % heads; const int i = s == 0 ? int(tokens) - 1 : rng() % tokens;
      const uint32_t* row = &host_bits[(size_t(h) * n + tile_of[i]) * words];
      std::vector<double> score; std::vector<size_t> at; double top = -1e300;
      for (size_t j = 0; j < tokens; ++j) if (bitmap::test(row, tile_of[j])) {
        const size_t qa = (size_t(i) * heads + h) * d, ka = (j * heads + h) * d; double x = 0;
        for (int c = 0; c < d; ++c) x += f(hq[qa + c]) * f(hk[ka + c]);
        score.push_back(x / std::sqrt(double(d))), at.push_back(ka); top = std::max(top, score.back());
      }
      std::vector<double> o(d); double sum = 0;
      for (size_t j = 0; j < at.size(); ++j) { const double w = std::exp(score[j] - top); sum += w; for (int c = 0; c < d; ++c) o[c] += w * f(hv[at[j] + c]); }
      double e = 0, m = 0; const size_t oa = (size_t(i) * heads + h) * d;
      for (int c = 0; c < d; ++c) { const double want = o[c] / sum, got = f(ho[oa + c]); e += (got - want) * (got - want), m += want * want; }
      const double r = std::sqrt(e / m); worst = r > worst || std::isnan(r) ? r : worst;
      const double l = std::abs(hl[size_t(h) * tokens + i] - (top + std::log(sum))); worst_lse = l > worst_lse || std::isnan(l) ? l : worst_lse;
    }
    return {worst, worst_lse};
  }
};
struct Result { double ms = 0, clk = 0, ghz = 0, watts = 0, mhz = 0; };
static Nvml nvml;
static Result measure(const Timed& t, const Layer& layer, long long* clocks, double seconds) {
  const auto call = layer.call(); Result r; cudaEvent_t b, e; cudaEventCreate(&b), cudaEventCreate(&e);
  const auto now = [] { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); };
  const auto some = [&](double until) { int n = 0; const double s = now(); do { for (int i = 0; i < 8; ++i) t.launch(call, clocks, 0); n += 8; check(cudaDeviceSynchronize(), t.name); } while (now() - s < until); return n; };
  cudaMemset(clocks, 0, 132 * 4 * 8 * 8);
  some(0.12);
  double j0 = nvml.joules(); const double t0 = now(); cudaEventRecord(b);
  const int n = some(seconds); cudaEventRecord(e); check(cudaDeviceSynchronize(), t.name);
  r.mhz = nvml.mhz(); float ms = 0; cudaEventElapsedTime(&ms, b, e); r.watts = (nvml.joules() - j0) / (now() - t0); r.ms = ms / n;
  const int blocks = 132 * t.blocks_per_sm; std::vector<long long> c(blocks * 8);
  cudaMemcpy(c.data(), clocks, 8 * c.size(), cudaMemcpyDeviceToHost);
  // one launch alone in events for its own clock
  long long most = 0; double mean = 0; 
  for (int i = 0; i < blocks; ++i) { long long end = 0; for (int w = 1; w <= 4; ++w) end = std::max(end, c[i * 8 + w]); most = std::max(most, end - c[i * 8]); mean += double(end - c[i * 8]) / blocks; }
  r.clk = most * 132.0 / layer.pairs; (void)mean; r.ghz = most / (r.ms * 1e6);
  cudaEventDestroy(b), cudaEventDestroy(e); return r;
}
int main(int argc, char** argv) {
  setvbuf(stdout, nullptr, _IOLBF, 0);
  const std::string folder = argc > 1 ? argv[1] : "."; const double seconds = argc > 2 ? atof(argv[2]) : 0.2;
  const std::string only = argc > 3 ? argv[3] : "";
  long long* clocks = allocate<long long>(132 * 4 * 8);
  cudaDeviceProp prop; check(cudaGetDeviceProperties(&prop, 0), "device"); std::printf("%s, %d SMs\n", prop.name, prop.multiProcessorCount);
  std::vector<const Timed*> usable;
  for (const Timed* t : variants) { if (!only.empty() && !std::strstr(only.c_str(), t->name)) continue;
    int regs = 0, local = 0, occ = 0; const std::string e = t->prepare(&regs, &local, &occ);
    std::printf("%-10s d %d: %d registers, %d B local, %d blocks per SM of %d wanted %s\n", t->name, t->d, regs, local, occ, t->blocks_per_sm, e.c_str());
    if (e.empty() && occ >= t->blocks_per_sm) usable.push_back(t); else { std::printf("  LEFT OUT\n"); cudaGetLastError(); } }
  for (int d : {128, 64}) for (const auto& [video, name] : {std::pair<Axes, const char*>{{32, 32, 32}, "32x32x32"}, {{21, 30, 52}, "21x30x52"}}) {
    Layer layer(video, 12, d);
    for (const char* kind : {"random", "correlated", "columns"}) {
      if (d == 64 && std::strcmp(kind, "columns") == 0) continue;
      layer.pattern(folder + "/" + name + "." + kind + ".bits");
      std::vector<std::pair<const Timed*, std::vector<Result>>> rows;
      std::printf("\nd %d %s:12 %s, %.0f pairs of tiles\n", d, name, kind, layer.pairs);
      for (const Timed* t : usable) if (t->d == d) rows.push_back({t, {}});
      if (std::strcmp(kind, "columns") != 0) for (float shift : {1.f, 0.f}) {
        const bool random = std::strcmp(kind, "random") == 0;
        if (shift != 0 && !random) continue;
        if (random) layer.draw(shift);
        for (auto& [t, r] : rows) {
          cudaMemset(layer.out, 0xff, 2 * layer.elements), cudaMemset(layer.lse, 0xff, 4 * layer.tokens * layer.heads);
          const std::string e = t->launch(layer.call(), clocks, 0); if (!e.empty()) { std::printf("%s: %s\n", t->name, e.c_str()); return 1; }
          check(cudaDeviceSynchronize(), t->name);
          const auto [out, lse] = layer.error();
          std::printf("  check %-10s shift %.0f: worst row %.5f, lse %.2g %s\n", t->name, shift, out, lse, out < 0.012 && lse < 1e-3 ? "ok" : "WRONG");
          if (shift != 0 && (!std::strcmp(t->name, "base") || !std::strcmp(t->name, "max3"))) {
            const Result x = measure(*t, layer, clocks, seconds);
            std::printf("  %-10s all scores negative: %8.4f ms %7.1f clk/tile %5.0f W\n", t->name, x.ms, x.clk, x.watts);
          }
        }
      }
      for (int round = 0; round < 2; ++round) for (auto& [t, r] : rows) r.push_back(measure(*t, layer, clocks, seconds));
      for (auto& [t, r] : rows) for (const Result& x : r)
        std::printf("  %-10s %8.4f ms %7.1f TFLOP/s %7.1f clk/tile %6.3f GHz (nvml %4.0f MHz) %5.0f W %6.3f pJ/FLOP\n", t->name, x.ms, 4.0 * d * layer.token_pairs / x.ms * 1e-9, x.clk, x.ghz, x.mhz, x.watts, x.watts * x.ms * 1e-3 / (4.0 * d * layer.token_pairs) * 1e12);
    }
  }
}
