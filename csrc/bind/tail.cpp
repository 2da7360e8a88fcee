// SPDX-License-Identifier: Apache-2.0
// The tail in vsa._C: which fields each call has, and what runs it.
#include "launch/tail.h"

#include "bind/fields.h"

namespace vsa::bind {
namespace {

struct TailHeadDim : OneOf<launch::FineHeadDims> {};
struct TailDtype : OneOf<launch::FineDtypes> {};

void bind_keys(py::module_& m) {
  using Keys = launch::TailKeys;
  bind_struct<Keys>(m, kClass<Keys>, "Means of the keys' tiles as the tail's kernels read them.",
                    {VSA_FIELD(Keys, k, NotNull), VSA_FIELD(Keys, k_low, NotNull),
                     VSA_FIELD(Keys, v, NotNull), VSA_FIELD(Keys, bias, NotNull)});
  using Call = launch::RoundMeans;
  auto bound = bind_struct<Call>(
      m, "RoundMeans", "Makes TailKeys of the means of keys and values.",
      {VSA_FIELD(Call, k_means, NotNull), VSA_FIELD(Call, v_means, NotNull), VSA_FIELD(Call, to),
       VSA_FIELD(Call, kv_grid), VSA_FIELD(Call, batch, Positive),
       VSA_FIELD(Call, kv_heads, Positive), VSA_FIELD(Call, head_dim, TailHeadDim),
       VSA_FIELD(Call, dtype, TailDtype)});
  bind_run<launch::round_means, launch::round_means_emulated>(bound);
}

}  // namespace

void bind_tail(py::module_& m) {
  bind_keys(m);
  using Forward = launch::TailForward;
  auto forward = bind_struct<Forward>(
      m, "TailForward", "Output and log-sum-exp of the fine stage become those of the whole.",
      {inherited<Forward, launch::FineForward>("fine"), VSA_FIELD(Forward, tail)});
  bind_run<launch::tail_forward, launch::tail_forward_emulated>(forward);
  using Call = launch::TailBackward;
  auto backward = bind_struct<Call>(
      m, "TailBackward", "Gradients of the means; after the fine stage's, the rest of dq.",
      {inherited<Call, launch::FineBackward>("fine"), VSA_FIELD(Call, tail),
       VSA_FIELD(Call, parts, NotNull), VSA_FIELD(Call, splits, Positive),
       VSA_FIELD(Call, sum_k, NotNull), VSA_FIELD(Call, sum_v, NotNull),
       VSA_FIELD(Call, accumulate)});
  bind_run<launch::tail_means, launch::tail_means_emulated>(
      backward, {"launch_means", "emulate_means", "step_means"});
  bind_run<launch::tail_queries, launch::tail_queries_emulated>(backward);
}

}  // namespace vsa::bind
