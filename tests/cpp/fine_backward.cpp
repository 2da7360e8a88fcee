// SPDX-License-Identifier: Apache-2.0
// Runs a pass of the fine backward on the emulator, on a small problem per schedule seed, and holds
// its gradients against fp64.
//
//   fine_backward NAMESPACE [uneven_]keys|queries|one_pass SEEDS [MUTANT]
//                 "seed N: " and the first report within so many seeds, or "nothing"
//
// By turns in one ring and in two. Uneven: some consumers want nearly all of many tiles, others
// few, far apart. The namespaces are vsa, or those of VSA_EACH_MUTANT, which the tests of
// tests/mutants write: one with kernels that behave as the mutant of a number, others with one
// mutant each.
#include <cstdio>

#include "backward_problem.h"

namespace vsa::test {
namespace {

// Resident tiles where they are not by default: in registers or in shared memory.
template <template <class, int> class Config, int RingsOf, int Loads>
struct TightKeys : Tight<Config, RingsOf, Loads> {
  static constexpr bool kKeysInRegisters = !Config<Element, D>::kKeysInRegisters;
};
template <template <class, int> class Config, int RingsOf, int Loads>
struct TightQueries : Tight<Config, RingsOf, Loads> {
  static constexpr bool kQueriesInRegisters = !Config<Element, D>::kQueriesInRegisters;
};

// One dS at a time.
template <template <class, int> class Config, template <int, int> class Sums_, int Loads>
struct TightOnePass : TightKeys<Config, 64, Loads> {
  using Sums = Sums_<2, 1>;
};

#ifndef VSA_EACH_MUTANT
#define VSA_EACH_MUTANT(KEYS, QUERIES, ONE_PASS, UNEVEN_KEYS, UNEVEN_QUERIES, UNEVEN_ONE_PASS) \
  KEYS(vsa)                                                                                    \
  QUERIES(vsa) ONE_PASS(vsa) UNEVEN_KEYS(vsa) UNEVEN_QUERIES(vsa) UNEVEN_ONE_PASS(vsa)
#endif

std::string answer(const std::string& space, const std::string& pass, unsigned seeds) {
#define VSA_PASS(name, called, Kernel, selection, wrong, ...) \
  if (space == #name && pass == called)                       \
    return first_report<name::Kernel, __VA_ARGS__>(Selection::selection, seeds, &Problem::wrong);
#define VSA_KEYS(name)                                            \
  VSA_PASS(name, "keys", FineBackwardKeys, Random, wrong_of_keys, \
           name::FineBackwardKeysConfig<Element, D>,              \
           TightKeys<name::FineBackwardKeysConfig, 128, kFewLoads>)
#define VSA_QUERIES(name)                                                  \
  VSA_PASS(name, "queries", FineBackwardQueries, Random, wrong_of_queries, \
           name::FineBackwardQueriesConfig<Element, D>,                    \
           TightQueries<name::FineBackwardQueriesConfig, 128, kFewLoads>)
#define VSA_ONE_PASS(name)                                                \
  VSA_PASS(name, "one_pass", FineBackwardKeys, Random, wrong_of_one_pass, \
           name::FineBackwardOnePassConfig<Element, D>,                   \
           TightOnePass<name::FineBackwardOnePassConfig, name::QuerySums, kFewLoads>)
#define VSA_UNEVEN_ONE_PASS(name)                                                    \
  VSA_PASS(name, "uneven_one_pass", FineBackwardKeys, UnevenKeys, wrong_of_one_pass, \
           name::FineBackwardOnePassConfig<Element, D>,                              \
           TightOnePass<name::FineBackwardOnePassConfig, name::QuerySums, kWindows>)
#define VSA_UNEVEN_KEYS(name)                                                \
  VSA_PASS(name, "uneven_keys", FineBackwardKeys, UnevenKeys, wrong_of_keys, \
           TightKeys<name::FineBackwardKeysConfig, 64, kWindows>,            \
           TightKeys<name::FineBackwardKeysConfig, 128, kWindows>)
#define VSA_UNEVEN_QUERIES(name)                                                         \
  VSA_PASS(name, "uneven_queries", FineBackwardQueries, UnevenQueries, wrong_of_queries, \
           TightQueries<name::FineBackwardQueriesConfig, 64, kWindows>,                  \
           TightQueries<name::FineBackwardQueriesConfig, 128, kWindows>)
  VSA_EACH_MUTANT(VSA_KEYS, VSA_QUERIES, VSA_ONE_PASS, VSA_UNEVEN_KEYS, VSA_UNEVEN_QUERIES,
                  VSA_UNEVEN_ONE_PASS)
  return "?";
}

}  // namespace
}  // namespace vsa::test

int main(int argc, char** argv) {
  if (argc == 5) vsa::test::mutant = std::stoi(argv[4]);
  std::puts(argc >= 4 ? vsa::test::answer(argv[1], argv[2], std::stoul(argv[3])).c_str() : "?");
}
