// SPDX-License-Identifier: Apache-2.0
// Rows and copies of text against plain loops over tokens. What is no text, and what no lane may
// read of a mask, differs from what belongs there, and what lies around results must stay.
//
//   clean_text NAMESPACE text SEEDS [MUTANT]    "seed N: " and the first report within so many, or
//                                               "nothing"
//
// The namespaces are vsa, or those of VSA_EACH_MUTANT, which tests/mutants/test_clean_text.py
// writes: one with a kernel that behaves as the mutant of a number, others with one mutant each.
#include "kernels/fine/clean_text.h"

#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "prim/host_block.h"
#include "reports.h"

namespace vsa::test {
namespace {

constexpr int kRoom = 64;  // elements around what is read and written
constexpr uint16_t kAround = 0xabcd;
constexpr int kMostText = 140;  // before and after the video

struct Random {
  std::mt19937 rng;
  int below(int end) { return static_cast<int>(rng() % static_cast<unsigned>(end)); }
};

// Tokens with heads inside or outside of them.
struct Tokens {
  int heads, length, head_dim;
  int64_t batch_stride, token_stride, head_stride;
  std::vector<uint16_t> memory;

  Tokens(Random& random, int batch, int length, int heads, int head_dim)
      : heads(heads), length(length), head_dim(head_dim) {
    const bool inside = random.below(2) == 0;
    const int64_t wide = head_dim + 8 * random.below(2);
    head_stride = inside ? wide : wide * (length + 1);
    token_stride = inside ? wide * (heads + 1) : wide;
    batch_stride = wide * (length + 1) * (heads + 1);
    const int64_t room = kMostText * token_stride;  // that a wrong kernel may read
    memory.resize(static_cast<size_t>(batch_stride * batch + room));
    for (uint16_t& x : memory) x = static_cast<uint16_t>(1 + random.below(0x7f00));
  }
  uint16_t at(int batch, int token, int head, int channel) const {
    return memory[static_cast<size_t>(batch * batch_stride + token * token_stride +
                                      head * head_stride + channel)];
  }
};

struct Problem {
  const int batch, prefix, suffix, head_dim;
  const bool masked;
  int64_t mask_batch, mask_token;
  std::vector<uint8_t> mask;
  std::vector<Tokens> tensors;

  explicit Problem(Random& random)
      : batch(1 + random.below(2)),
        prefix(random.below(3) == 0 ? 0 : 1 + random.below(kMostText)),
        suffix(prefix == 0 || random.below(2) == 0 ? 1 + random.below(kMostText) : 0),
        head_dim(random.below(2) == 0 ? 64 : 128),
        masked(random.below(4) > 0),
        mask_batch(random.below(3) == 0 ? 0 : prefix + suffix + 100),
        mask_token(1 + random.below(2)) {
    mask_batch *= mask_token;
    mask.assign(static_cast<size_t>(mask_batch * batch + 2 * (prefix + suffix + 100)), 1);
    for (int b = 0; b < batch; ++b)
      for (int i = 0; i < prefix + suffix; ++i)
        mask[static_cast<size_t>(b * mask_batch + i * mask_token)] = random.below(2) == 0;
    for (int i = random.below(CleanTextParams::kMost + 1); masked && i > 0; --i)
      tensors.emplace_back(random, batch, prefix + suffix + 1 + random.below(9),
                           1 + random.below(3), head_dim);
  }
  bool real(int b, int text) const {
    return !masked || mask[static_cast<size_t>(b * mask_batch + text * mask_token)] != 0;
  }
  int tiles() const { return ceil_div(prefix, kTileRows) + ceil_div(suffix, kTileRows); }

  std::vector<uint64_t> rows() const {
    std::vector<uint64_t> words(static_cast<size_t>(batch * tiles()), 0);
    for (int b = 0; b < batch; ++b)
      for (int i = 0; i < prefix + suffix; ++i) {
        const int row = i < prefix ? i : i - prefix;
        const int first = i < prefix ? 0 : ceil_div(prefix, kTileRows);
        const int tile = b * tiles() + first + row / kTileRows;
        words[static_cast<size_t>(tile)] |= uint64_t{real(b, i)} << row % kTileRows;
      }
    return words;
  }
  std::vector<uint16_t> clean(const Tokens& x) const {
    std::vector<uint16_t> copy;
    for (int b = 0; b < batch; ++b)
      for (int i = 0; i < prefix + suffix; ++i)
        for (int head = 0; head < x.heads; ++head)
          for (int channel = 0; channel < head_dim; ++channel) {
            const int token = i < prefix ? i : x.length - suffix + (i - prefix);
            copy.push_back(real(b, i) ? x.at(b, token, head, channel) : uint16_t{0});
          }
    return copy;
  }
};

// Memory for results with room around it.
template <class T>
struct Results {
  std::vector<T> memory;
  explicit Results(size_t size) : memory(size + 2 * kRoom, static_cast<T>(kAround)) {}
  T* data() { return memory.data() + kRoom; }
  void expect(const std::vector<T>& answer, const char* what) const {
    std::vector<T> all(kRoom, static_cast<T>(kAround));
    all.insert(all.end(), answer.begin(), answer.end());
    all.insert(all.end(), kRoom, static_cast<T>(kAround));
    require(memory == all, what);
  }
};

template <class Kernel, class Params>
std::string first_report(unsigned seeds) {
  return first_of(seeds, [](unsigned seed) {
    Random random{std::mt19937(seed)};
    const Problem problem(random);
    const std::vector<uint64_t> words = problem.rows();
    Results<uint64_t> rows(words.size());
    std::vector<Results<uint16_t>> copies;
    Params params{};
    params.valid = problem.masked ? problem.mask.data() : nullptr;
    params.batch_stride = problem.mask_batch;
    params.token_stride = problem.mask_token;
    params.prefix = problem.prefix;
    params.suffix = problem.suffix;
    params.rows = reinterpret_cast<uint8_t*>(rows.data());
    params.head_dim = problem.head_dim;
    for (const Tokens& x : problem.tensors) copies.emplace_back(problem.clean(x).size());
    for (size_t i = 0; i < copies.size(); ++i) {
      const Tokens& x = problem.tensors[i];
      auto& to = params.tensors[i];
      to.tokens = {x.memory.data(), x.batch_stride, x.token_stride, x.head_stride};
      to.clean = reinterpret_cast<Chunk*>(copies[i].data());
      to.heads = x.heads;
      to.suffix_begin = x.length - problem.suffix;
    }
    for (size_t lane = 0; lane < words.size() * Kernel::kBytesOfRows; ++lane)
      Kernel::rows(params, static_cast<int64_t>(lane));
    rows.expect(words, "WRONG ROWS");
    for (size_t i = 0; i < copies.size(); ++i) {
      const std::vector<uint16_t> answer = problem.clean(problem.tensors[i]);
      for (size_t lane = 0; lane < answer.size() / kChunkElements; ++lane)
        Kernel::copy(params, static_cast<int>(i), static_cast<int64_t>(lane));
      copies[i].expect(answer, "WRONG COPY");
    }
  });
}

#ifndef VSA_EACH_MUTANT
#define VSA_EACH_MUTANT(TEXT) TEXT(vsa)
#endif

std::string answer(const std::string& space, const std::string& problem, unsigned seeds) {
#define VSA_TEXT(name)                     \
  if (space == #name && problem == "text") \
    return first_report<name::CleanText, name::CleanTextParams>(seeds);
  VSA_EACH_MUTANT(VSA_TEXT)
  return "?";
}

}  // namespace
}  // namespace vsa::test

int main(int argc, char** argv) {
  if (argc == 5) vsa::test::mutant = std::stoi(argv[4]);
  std::puts(argc >= 4 ? vsa::test::answer(argv[1], argv[2], std::stoul(argv[3])).c_str() : "?");
}
