// SPDX-License-Identifier: Apache-2.0
// How the programs of this folder say what is wrong.
#pragma once
#include <stdexcept>
#include <string>

namespace vsa::test {

// What kernels behave as, of the mutants in their common copy (tests/mutants/schema.py), or 0:
// none.
inline int mutant = 0;

namespace {

// Something is not what it should be.
struct Wrong : std::runtime_error {
  using std::runtime_error::runtime_error;
};
void require(bool holds, const std::string& what) {
  if (!holds) throw Wrong(what);
}

// check(seed) throws what is wrong. "seed N: " and the first that it throws within so many seeds,
// or "nothing".
template <class Check>
std::string first_of(unsigned seeds, Check check) {
  for (unsigned seed = 0; seed < seeds; ++seed) {
    try {
      check(seed);
    } catch (const std::runtime_error& report) {
      return "seed " + std::to_string(seed) + ": " + report.what();
    }
  }
  return "nothing";
}

}  // namespace
}  // namespace vsa::test
