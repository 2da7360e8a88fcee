// A forward kernel alone: prepared parameters in, time and clocks out.
#pragma once
#include <string>
#include "launch/fine.h"
struct Timed {
  const char* name;
  int d, blocks_per_sm, consumers;
  // launches once; clocks: [blocks, 8] begin and end pairs (device)
  std::string (*launch)(const vsa::launch::FineForward&, long long* clocks, cudaStream_t);
  std::string (*prepare)(int* regs, int* local, int* occupancy);
};
