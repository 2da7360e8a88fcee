// SPDX-License-Identifier: Apache-2.0
// Means of runs and their scores in vsa._C: which fields each call has, and what runs it.
#include "launch/sub_blocks.h"

#include "bind/fields.h"

namespace vsa::bind {
namespace {

struct RunDtype : OneOf<launch::FineDtypes> {};
struct RunHeadDim : OneOf<launch::FineHeadDims> {};
struct RunSlots : OneOf<launch::RunSlots> {};

void bind_run_means(py::module_& m) {
  using Tensor = launch::RunTensor;
  bind_struct<Tensor>(
      m, kClass<Tensor>, "A tensor of tokens, and where the means of its tiles and their runs go.",
      {VSA_FIELD(Tensor, tokens, NotNull), VSA_FIELD(Tensor, grid),
       VSA_FIELD(Tensor, heads, Positive), VSA_FIELD(Tensor, means), VSA_FIELD(Tensor, rows),
       VSA_FIELD(Tensor, factors), VSA_FIELD(Tensor, are_keys)});
  using Call = launch::RunMeans;
  auto bound = bind_struct<Call>(
      m, "RunMeans", "Means of the tiles of up to three tensors, and of their runs.",
      {VSA_FIELD(Call, tensors), VSA_FIELD(Call, batch, Positive),
       VSA_FIELD(Call, head_dim, RunHeadDim), VSA_FIELD(Call, runs, Positive),
       VSA_FIELD(Call, slots, RunSlots), VSA_FIELD(Call, dtype, RunDtype)});
  bind_run<launch::run_means, launch::run_means_emulated>(bound);
}

void bind_scores(py::module_& m) {
  using Call = launch::SubBlockScores;
  auto bound =
      bind_struct<Call>(m, "SubBlockScores", "Scores of tiles by the means of their runs.",
                        {VSA_FIELD(Call, queries, NotNull), VSA_FIELD(Call, query_factors, NotNull),
                         VSA_FIELD(Call, keys, NotNull), VSA_FIELD(Call, key_factors, NotNull),
                         VSA_FIELD(Call, scores, NotNull), VSA_FIELD(Call, matrices, Positive),
                         VSA_FIELD(Call, rows, Positive), VSA_FIELD(Call, columns, Positive),
                         VSA_FIELD(Call, head_dim, RunHeadDim), VSA_FIELD(Call, slots, RunSlots),
                         VSA_FIELD(Call, has_empty), VSA_FIELD(Call, scale)});
  bind_run<launch::sub_block_scores, launch::sub_block_scores_emulated>(bound);
}

}  // namespace

void bind_sub_blocks(py::module_& m) {
  bind_run_means(m);
  bind_scores(m);
  m.attr("RUN_SLOTS") = RunSlots::all();
}

}  // namespace vsa::bind
