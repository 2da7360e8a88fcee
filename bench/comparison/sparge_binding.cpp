// SPDX-License-Identifier: Apache-2.0
// What bench/comparison/serving.py calls in SpargeAttention, compiled by bench/compile_peers.py.
// The project's own binding names kernels for every architecture, all of which would be compiled.
#include <torch/extension.h>

#include "fused/fused.h"
#include "qattn/attn_cuda.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("attention", &qk_int8_sv_f8_accum_f32_block_sparse_attn_inst_buf_fuse_v_scale_sm90);
  module.def("transpose_pad_permute", &transpose_pad_permute_cuda);
  module.def("scale_fuse_quant", &scale_fuse_quant_cuda);
}
