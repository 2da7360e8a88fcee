// SPDX-License-Identifier: Apache-2.0
// csrc/prim/facts.h, the emulator's 8-bit numbers and the weights of the softmax as a library of C
// functions, for the tests that hold them against their definitions: tests/kernels/facts_library.py
// calls them.
#include "prim/facts.h"

#include "kernels/select/softmax_mass.h"
#include "prim/host_numbers8.h"

namespace {

// numbers: T, H, W, tile t, h, w, prefix, suffix
vsa::Grid grid_of(const int* numbers) {
  const auto axes = [](const int* n) { return vsa::Axes{n[0], n[1], n[2]}; };
  return vsa::make_grid(axes(numbers), axes(numbers + 3), numbers[6], numbers[7]);
}

}  // namespace

extern "C" {

int num_tiles(const int* numbers) { return grid_of(numbers).num_tiles(); }

// places [tiles, 4]: t, h, w of the first token and the Clip bits; masks [tiles]: rows that are
// tokens; tokens [tiles, 64]: position in the sequence, -1 where a row is no token
void tile_table(const int* numbers, int32_t* places, uint64_t* masks, int32_t* tokens) {
  const vsa::Grid grid = grid_of(numbers);
  for (int tile = 0; tile < grid.num_tiles(); ++tile) {
    const vsa::Place at = grid.place(tile);
    *places++ = at.first.t;
    *places++ = at.first.h;
    *places++ = at.first.w;
    *places++ = static_cast<int32_t>(at.clip);
    *masks++ = grid.row_mask(tile);
    for (int row = 0; row < vsa::kTileRows; ++row) *tokens++ = grid.token(at, row);
  }
}

int tile_of(const int* numbers, int token) { return grid_of(numbers).tile_of(token); }
int row_of(const int* numbers, int token) { return grid_of(numbers).row_of(token); }

int words(int bits) { return vsa::bitmap::words(bits); }
void set_bit(uint32_t* row, int bit) { vsa::bitmap::set(row, bit); }
int count_bits(const uint32_t* row, int bits) { return vsa::bitmap::count(row, bits); }
bool test_bit(const uint32_t* row, int bit) { return vsa::bitmap::test(row, bit); }
int lowest_bit(uint32_t word) { return vsa::bitmap::lowest(word); }
int highest_bit(uint32_t word) { return vsa::bitmap::highest(word); }
void transpose_bits(const uint32_t* in, int rows, int columns, uint32_t* out) {
  vsa::bitmap::transpose(in, rows, columns, out);
}

// e4m3 codes of n floats, and the floats of n codes
void to_e4m3(const float* x, int n, uint8_t* codes) {
  for (int i = 0; i < n; ++i) codes[i] = vsa::host::narrow(vsa::E4m3{}, x[i]);
}
void from_e4m3(const uint8_t* codes, int n, float* x) {
  for (int i = 0; i < n; ++i) x[i] = vsa::host::widen(vsa::E4m3{}, codes[i]);
}
// codes [n, 4] of floats [n, 4]; which: 0 E4m3, 1 S8
void pack8(const float* x, int n, int which, uint32_t* fours) {
  for (int i = 0; i < n; ++i, x += 4)
    fours[i] = which == 0 ? vsa::pack8<vsa::E4m3>(x[0], x[1], x[2], x[3])
                          : vsa::pack8<vsa::S8>(x[0], x[1], x[2], x[3]);
}
// fours [n] of floats [n, 4]
void line_fours(const float* x, int n, uint32_t* fours) {
  for (int i = 0; i < n; ++i, x += 4)
    fours[i] = vsa::low_bytes(vsa::line_codes(x[0], x[1]), vsa::line_codes(x[2], x[3]));
}
// left, right [n, 32], sums [n]: added to, in fp32 or halves
void sum_fp8(const float* left, const float* right, int n, int in_halves, float* sums) {
  for (int i = 0; i < n; ++i, left += vsa::kReduction8, right += vsa::kReduction8) {
    const float sum = vsa::host::sum_fp8(left, right, sums[i]);
    sums[i] = in_halves ? vsa::host::held_sum(vsa::Fp16{}, sum) : vsa::host::held_sum(0.0f, sum);
  }
}

uint32_t softmax_weight(float gap) { return vsa::softmax_weight(gap); }

}  // extern "C"
