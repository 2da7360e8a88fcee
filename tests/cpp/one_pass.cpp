// SPDX-License-Identifier: Apache-2.0
// Runs the backward in one pass at head_dim 128, whose consumers make dQ, on the emulator, and
// holds its gradients against fp64.
//
//   one_pass NAMESPACE [uneven_]one_pass SEEDS [MUTANT]
//            "seed N: " and the first report within so many seeds, or "nothing"
//
// By turns with the rings that it has and with chunks of few loads. Uneven: one key tile wants
// nearly all of many query tiles, its neighbour few, far apart. The namespaces are those of
// fine_backward.cpp.
#include <cstdio>

#define VSA_HEAD_DIM 128
#include "backward_problem.h"

namespace vsa::test {
namespace {

template <template <class, int> class Config, int Loads>
struct TightOnePass : Config<Element, D> {
  static constexpr int kChunkLoads = Loads;
};

#ifndef VSA_EACH_MUTANT
#define VSA_EACH_MUTANT(ONE_PASS, UNEVEN_ONE_PASS) ONE_PASS(vsa) UNEVEN_ONE_PASS(vsa)
#endif

std::string answer(const std::string& space, const std::string& pass, unsigned seeds) {
#define VSA_PASS(name, called, selection, loads)                                             \
  if (space == #name && pass == called)                                                      \
    return first_report<name::FineBackwardKeys, name::FineBackwardOnePassConfig<Element, D>, \
                        TightOnePass<name::FineBackwardOnePassConfig, loads>>(               \
        Selection::selection, seeds, &Problem::wrong_of_one_pass);
#define VSA_ONE_PASS(name) VSA_PASS(name, "one_pass", Random, kFewLoads)
#define VSA_UNEVEN_ONE_PASS(name) VSA_PASS(name, "uneven_one_pass", UnevenKeys, kWindows)
  VSA_EACH_MUTANT(VSA_ONE_PASS, VSA_UNEVEN_ONE_PASS)
  return "?";
}

}  // namespace
}  // namespace vsa::test

int main(int argc, char** argv) {
  if (argc == 5) vsa::test::mutant = std::stoi(argv[4]);
  std::puts(argc >= 4 ? vsa::test::answer(argv[1], argv[2], std::stoul(argv[3])).c_str() : "?");
}
