// SPDX-License-Identifier: Apache-2.0
// Runs products8.h on the emulator. One command per call, one line of answer:
//
//   products s8|e4m3|half 64|128 SEED   results that are wrong
//   mutant NAME SEEDS                   the first report within so many seeds, or "nothing"
#include "products8.h"

#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "prim/host_block.h"

namespace vsa::test {
namespace {

template <class Element, int Rows, int RowBytes>
void put(std::vector<unsigned char>& image, int row, int byte, float x) {
  image[ByteTile<Rows, RowBytes>::place(row, byte)] = host::narrow(Element{}, x);
}

// Small whole numbers, so that every sum is exact.
template <class Element, int D, class Scores, Mutant8 mutant = Mutant8::None>
int products(unsigned seed) {
  using Kernel = Products8<Element, D, Scores, mutant>;
  constexpr int kOut = Kernel::kOut;
  std::mt19937 rng(seed);
  const auto draw = [&](int most) { return static_cast<int>(rng() % (2 * most + 1)) - most; };
  std::vector<int> q(64 * D), k(64 * D), v(64 * kOut);
  std::vector<unsigned char> images[3] = {
      std::vector<unsigned char>(sizeof(ByteTile<64, D>)),
      std::vector<unsigned char>(sizeof(ByteTile<64, D>)),
      std::vector<unsigned char>(sizeof(ByteTile<kOut, kHalfRowBytes>))};
  const int most = std::is_same_v<Element, S8> ? 127 : 3;
  for (int row = 0; row < 64; ++row) {
    for (int c = 0; c < D; ++c) {
      put<Element, 64, D>(images[0], row, c, q[row * D + c] = draw(most));
      put<Element, 64, D>(images[1], row, c, k[row * D + c] = draw(most));
    }
    const int place = mutant == Mutant8::KeysInOrder ? row : key_place(row);
    for (int c = 0; c < kOut; ++c)
      put<E4m3, kOut, kHalfRowBytes>(images[2], c, place, v[row * kOut + c] = c < D ? draw(4) : 1);
  }
  // bulk copies take aligned granules of 16 bytes
  std::vector<Chunk> aligned[3];
  for (int i = 0; i < 3; ++i) {
    aligned[i].resize(images[i].size() / sizeof(Chunk));
    std::memcpy(aligned[i].data(), images[i].data(), images[i].size());
  }
  const auto image = [&](int i) { return reinterpret_cast<unsigned char*>(aligned[i].data()); };
  std::vector<float> scores(2 * 64 * 64, -1), out(64 * kOut, -1);
  host::run_block<Kernel>({image(0), image(1), image(2), scores.data(), out.data()}, 0, 1, seed);

  int wrong = 0;
  for (int i = 0; i < 64; ++i) {
    std::vector<int> wanted(kOut);
    for (int j = 0; j < 64; ++j) {
      int score = 0;
      for (int c = 0; c < D; ++c) score += q[i * D + c] * k[j * D + c];
      for (int again = 0; again < 2; ++again)
        wrong += scores[(again * 64 + i) * 64 + j] != static_cast<float>(score);
      for (int c = 0; c < kOut; ++c) wanted[c] += (score & 7) * v[j * kOut + c];
    }
    for (int c = 0; c < kOut; ++c) wrong += out[i * kOut + c] != static_cast<float>(wanted[c]);
  }
  return wrong;
}

template <Mutant8 mutant>
std::string report(unsigned seeds) {
  for (unsigned seed = 0; seed < seeds; ++seed) {
    const std::string at = "seed " + std::to_string(seed) + ": ";
    try {
      if (products<S8, 128, int, mutant>(seed) > 0) return at + "WRONG NUMBERS";
      if (products<E4m3, 64, float, mutant>(seed) > 0) return at + "WRONG NUMBERS";
    } catch (const host::Hazard& hazard) {
      return at + hazard.what();
    }
  }
  return "nothing";
}

std::string find(const std::string& name, unsigned seeds) {
  if (name == "None") return report<Mutant8::None>(seeds);
  if (name == "WrongRows") return report<Mutant8::WrongRows>(seeds);
  if (name == "HalfStep") return report<Mutant8::HalfStep>(seeds);
  if (name == "WrongGroup") return report<Mutant8::WrongGroup>(seeds);
  if (name == "NoOnes") return report<Mutant8::NoOnes>(seeds);
  if (name == "PlainQueries") return report<Mutant8::PlainQueries>(seeds);
  if (name == "OperandInFlight") return report<Mutant8::OperandInFlight>(seeds);
  if (name == "NoFence") return report<Mutant8::NoFence>(seeds);
  if (name == "KeysInOrder") return report<Mutant8::KeysInOrder>(seeds);
  return "no such mutant";
}

std::string answer(const std::vector<std::string>& words) {
  if (words.size() == 3 && words[0] == "mutant") return find(words[1], std::stoul(words[2]));
  if (words.size() != 4 || words[0] != "products") return "?";
  const unsigned seed = std::stoul(words[3]);
  const auto run = [&]<class Element, class Scores>() {
    return std::to_string(words[2] == "64" ? products<Element, 64, Scores>(seed)
                                           : products<Element, 128, Scores>(seed));
  };
  if (words[1] == "s8") return run.template operator()<S8, int>();
  if (words[1] == "e4m3") return run.template operator()<E4m3, float>();
  return run.template operator()<E4m3, Fp16>();
}

}  // namespace
}  // namespace vsa::test

int main(int argc, char** argv) {
  try {
    std::puts(vsa::test::answer(std::vector<std::string>(argv + 1, argv + argc)).c_str());
  } catch (const vsa::host::Hazard& hazard) {
    std::puts(hazard.what());
  }
}
