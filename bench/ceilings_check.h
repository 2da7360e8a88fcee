// SPDX-License-Identifier: Apache-2.0
// What the loops are held against: numbers of an image of shared memory, in double precision.
#pragma once
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "ceilings_host.h"
#include "tile/tile.h"

namespace vsa::ceilings {

// Of a root mean square; operands are rounded to 8 bits, a tile that is left out would be half or
// more.
constexpr double kMostError = 0.05;

using Matrix = std::vector<double>;  // [rows, D]

// Panels of so many rows and 64 channels each, one after the other.
inline Matrix read(const unsigned char* bytes, int rows, int channels) {
  Matrix numbers(rows * channels);
  for (int row = 0; row < rows; ++row)
    for (int channel = 0; channel < channels; ++channel) {
      const uint32_t at = swizzle128((channel / kPanelChannels * rows + row) * kRowBytes +
                                     channel % kPanelChannels * kElementBytes);
      uint16_t bits;
      std::memcpy(&bits, bytes + at, sizeof bits);
      const uint32_t word = uint32_t{bits} << 16;
      float x;
      std::memcpy(&x, &word, sizeof x);
      numbers[row * channels + channel] = x;
    }
  return numbers;
}
template <int D>
Matrix read(const Tile<D>& tile) {
  return read(tile.bytes, kTileRows, D);
}

inline double error_of(const Matrix& expected, const float* found) {
  double most = 0, squares = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double error = std::abs(expected[i] - found[i]);
    if (!(error <= most)) most = error;  // NaN too
    squares += expected[i] * expected[i];
  }
  return most / std::sqrt(squares / expected.size());
}

inline double larger(double a, double b) { return a > b || a != a ? a : b; }

// What so many blocks had in shared memory, each where a Shared may lie. Barriers, which begin
// `image` bytes from its start, are not in it.
template <class Shared>
auto read_images(const unsigned char* images, size_t blocks, size_t image) {
  std::unique_ptr<unsigned char[], void (*)(void*)> to(
      static_cast<unsigned char*>(std::aligned_alloc(kSwizzleBytes, blocks * sizeof(Shared))),
      std::free);
  for (size_t b = 0; b < blocks; ++b)
    check(cudaMemcpy(to.get() + b * sizeof(Shared), images + b * image, image,
                     cudaMemcpyDeviceToHost),
          "cudaMemcpy");
  return to;
}

}  // namespace vsa::ceilings
