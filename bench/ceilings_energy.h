// SPDX-License-Identifier: Apache-2.0
// What a launch takes while others follow it without a pause: its time, and its energy by NVML's
// counter.
#pragma once
#include <dlfcn.h>

#include "ceilings_host.h"

namespace vsa::ceilings {

struct Sustained {
  double ms, joules;  // of one launch; joules are negative where NVML does not say
};

// Of the first GPU, since it was switched on.
inline double joules_so_far() {
  using Device = void*;
  static void* library = dlopen("libnvidia-ml.so.1", RTLD_NOW);
  if (library == nullptr) return -1;
  static const auto init = reinterpret_cast<int (*)()>(dlsym(library, "nvmlInit_v2"));
  static const auto find =
      reinterpret_cast<int (*)(unsigned, Device*)>(dlsym(library, "nvmlDeviceGetHandleByIndex_v2"));
  static const auto read = reinterpret_cast<int (*)(Device, unsigned long long*)>(
      dlsym(library, "nvmlDeviceGetTotalEnergyConsumption"));
  static const bool ready = init != nullptr && find != nullptr && read != nullptr && init() == 0;
  Device device = nullptr;
  unsigned long long millijoules = 0;
  if (!ready || find(0, &device) != 0 || read(device, &millijoules) != 0) return -1;
  return 1e-3 * millijoules;
}

// Launches for about so many milliseconds, after a tenth of it for warming up.
template <class Launch>
Sustained sustain(double wanted_ms, Launch launch) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  const auto run = [&](int count) {
    float ms = 0;
    check(cudaEventRecord(begin), "cudaEventRecord");
    for (int i = 0; i < count; ++i) launch(static_cast<uint32_t>(i) * 7919);
    check(cudaGetLastError(), "a launch");
    check(cudaEventRecord(end), "cudaEventRecord");
    check(cudaEventSynchronize(end), "a kernel");
    check(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
    return double{ms};
  };
  run(1);
  const double once = run(2) / 2;
  run(1 + static_cast<int>(wanted_ms / 10 / once));
  const int count = 1 + static_cast<int>(wanted_ms / once);
  const double before = joules_so_far();
  const double ms = run(count);
  const double after = joules_so_far();
  return {ms / count, before < 0 || after < 0 ? -1 : (after - before) / count};
}

}  // namespace vsa::ceilings
