// SPDX-License-Identifier: Apache-2.0
// Stands in for the .cu files in a build without nvcc: the same functions, each saying what is
// missing.
#include "launch/build_info.h"
#include "launch/chunks.h"
#include "launch/clean_text.h"
#include "launch/coarse_select.h"
#include "launch/fine.h"
#include "launch/float_product.h"
#include "launch/low_precision.h"
#include "launch/masked_coarse.h"
#include "launch/padded.h"
#include "launch/sub_blocks.h"
#include "launch/tail.h"

namespace vsa::launch {
namespace {

constexpr const char* kMissing =
    "this build of vsa has no CUDA part: reinstall where nvcc is found (VSA_CUDA=1 insists on it)";

}  // namespace

CudaPart cuda_part() { return {false, 0, ""}; }

std::string device_count(int* count) {
  *count = 0;
  return kMissing;
}

std::string fine_forward(const FineForward&, int, void*) { return kMissing; }
std::string backward_rows(const FineBackward&, int, void*) { return kMissing; }
std::string fine_backward(const FineBackward&, int, void*) { return kMissing; }
std::string transpose_bitmaps(const BitmapTranspose&, int, void*) { return kMissing; }
std::string choose_axes(const AxisChoice&, int, void*) { return kMissing; }
std::string sort_groups(const GroupSort&, int, void*) { return kMissing; }
std::string clean_text(const CleanText&, int, void*) { return kMissing; }
std::string tile_means(const TileMeans&, int, void*) { return kMissing; }
std::string select_tiles(const SelectTiles&, int, void*) { return kMissing; }
std::string softmax_rows(const SoftmaxRows&, int, void*) { return kMissing; }
std::string multiply(const Products&, int, void*) { return kMissing; }
std::string channel_statistics(const ChannelStatistics&, int, void*) { return kMissing; }
std::string quantise_tiles(const QuantiseTiles&, int, void*) { return kMissing; }
std::string low_precision_forward(const LowPrecisionForward&, int, void*) { return kMissing; }
std::string score_gradient(const ScoreGradient&, int, void*) { return kMissing; }
std::string round_means(const RoundMeans&, int, void*) { return kMissing; }
std::string tail_forward(const TailForward&, int, void*) { return kMissing; }
std::string tail_means(const TailBackward&, int, void*) { return kMissing; }
std::string tail_queries(const TailBackward&, int, void*) { return kMissing; }
std::string run_means(const RunMeans&, int, void*) { return kMissing; }
std::string masked_tile_means(const MaskedTileMeans&, int, void*) { return kMissing; }
std::string masked_select_tiles(const MaskedSelectTiles&, int, void*) { return kMissing; }
std::string masked_softmax_rows(const MaskedSoftmaxRows&, int, void*) { return kMissing; }
std::string masked_multiply(const MaskedProducts&, int, void*) { return kMissing; }
std::string masked_score_gradient(const MaskedScoreGradient&, int, void*) { return kMissing; }
std::string chunk_means(const ChunkMeans&, int, void*) { return kMissing; }
std::string reorder_bitmap(const ReorderBitmap&, int, void*) { return kMissing; }
std::string keep_tiles(const KeptTiles&, int, void*) { return kMissing; }
std::string hide_empty(const HideEmpty&, int, void*) { return kMissing; }
std::string sub_block_scores(const SubBlockScores&, int, void*) { return kMissing; }

}  // namespace vsa::launch
