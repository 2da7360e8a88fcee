// SPDX-License-Identifier: Apache-2.0
// Shared memory through ordinary loads and stores, and barriers, as PTX.
#pragma once
#include "prim/sm90_registers.h"

namespace vsa {

VSA_DEVICE uint32_t smem_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
VSA_DEVICE uint32_t* smem_words(uint32_t address) {
  return static_cast<uint32_t*>(__cvta_shared_to_generic(address));
}
VSA_DEVICE void note_write(const void*, int, Layout = Layout::Linear) {}
VSA_DEVICE void note_read(const void*, int, Layout = Layout::Linear) {}
template <class T>
VSA_DEVICE void label(const T&, const char*, int) {}
// By four instructions: a lane has the address of a row of one of four 8x8 matrices.
VSA_DEVICE void store_panel(uint32_t panel, const Operand<64>& a) {
  const int t = no_hoist(static_cast<int>(threadIdx.x)) % kWarpgroupThreads;
  const int row = t / kWarpThreads * 16 + t % 16;
  const uint32_t at = panel + row * kRowBytes + (t / 16 % 2 ^ row % 8) * kChunkBytes;
  VSA_UNROLL
  for (int i = 0; i < 4; ++i)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     at ^ i * 2 * kChunkBytes),
                 "r"(a.x[4 * i]), "r"(a.x[4 * i + 1]), "r"(a.x[4 * i + 2]), "r"(a.x[4 * i + 3])
                 : "memory");
}
VSA_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

struct Mbarrier {
  uint64_t word;

  VSA_DEVICE void init(int arrivals, const char*, int) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address()), "r"(arrivals));
  }
  VSA_DEVICE void arrive_all() { arrive_one(); }
  VSA_DEVICE void arrive_warp() { arrive_one(); }
  VSA_DEVICE void arrive_one() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address()) : "memory");
  }
  VSA_DEVICE void arrive_one(int times) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(address()), "r"(times)
                 : "memory");
  }
  VSA_DEVICE void arrive_expect_tx(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()),
                 "r"(bytes)
                 : "memory");
  }
  VSA_DEVICE void wait(int use) {
    asm volatile(
        "{.reg .pred done;\n"
        "AGAIN_%=:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra AGAIN_%=;}" ::"r"(address()),
        "r"(use & 1)
        : "memory");
  }
  // With a limit, here 10 ms, ptxas puts a sleep between two looks that the barrier ends; without
  // one the thread looks again every 15 clocks.
  VSA_DEVICE void wait_asleep(int use) {
    asm volatile(
        "{.reg .pred done;\nAGAIN_%=:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, %2;\n@!done bra AGAIN_%=;}" ::"r"(
            address()),
        "r"(use & 1), "r"(10000000)
        : "memory");
  }
  VSA_DEVICE bool is_over(int use) {
    uint32_t over;
    asm volatile(
        "{.reg .pred over;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 over, [%1], %2;\n"
        "selp.u32 %0, 1, 0, over;}"
        : "=r"(over)
        : "r"(address()), "r"(use & 1)
        : "memory");
    return over != 0;
  }
  // By a predicate on the instruction: no branch.
  VSA_DEVICE bool is_over(int use, bool wanted) {
    uint32_t over;
    asm volatile(
        "{.reg .pred over, wanted;\nsetp.ne.s32 wanted, %3, 0;\nsetp.ne.s32 over, 0, 0;\n"
        "@wanted mbarrier.test_wait.parity.shared::cta.b64 over, [%1], %2;\n"
        "selp.u32 %0, 1, 0, over;}"
        : "=r"(over)
        : "r"(address()), "r"(use & 1), "r"(int{wanted})
        : "memory");
    return over != 0;
  }

 private:
  VSA_DEVICE uint32_t address() const { return smem_address(&word); }
};

VSA_DEVICE void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace vsa
