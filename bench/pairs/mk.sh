# mk.sh NAME D BLOCKS_PER_SM 'KERNEL' flags -> NAME.o ; MINB: blocks for launch bounds

[ -n "$RUN" ] || RUN="run_kernel<K>(params);"
n=$1; d=$2; bps=$3; k=$4; shift 4
cat > $n.cu <<EOF
#include "variant.inc"
using namespace vsa;
namespace $n {
using K = $k;
__global__ void __launch_bounds__(${THREADS:-K::kThreads}, $bps) timed_kernel(const __grid_constant__ K::Params params, long long* clocks) {
  if (threadIdx.x == 0) clocks[blockIdx.x * 8] = clock64();
  $RUN
  if (threadIdx.x % 128 == 0) clocks[blockIdx.x * 8 + 1 + threadIdx.x / 128] = clock64();
}
std::string prepare(int* regs, int* local, int* occ) {
  cudaError_t e = cudaFuncSetAttribute(timed_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(K::SharedMemory));
  if (e == cudaSuccess) e = cudaFuncSetAttribute(timed_kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100);
  cudaFuncAttributes a{};
  if (e == cudaSuccess) e = cudaFuncGetAttributes(&a, timed_kernel);
  *regs = a.numRegs; *local = a.localSizeBytes;
  if (e == cudaSuccess) e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(occ, timed_kernel, ${THREADS:-K::kThreads}, sizeof(K::SharedMemory));
  return launch::sentence("prepare", e);
}
std::string go(const launch::FineForward& call, long long* clocks, cudaStream_t stream) {
  K::Params params{};
  if (std::string e = launch::make_params(params, call, launch::encode); !e.empty()) return e;
  const int work = params.batch * params.heads * ceil_div(params.queries.grid.num_tiles() + params.queries.text_tiles, K::kConsumers);
  cudaMemsetAsync(call.tile_counter, 0, 4, stream);
  timed_kernel<<<std::min(work, 132 * $bps), ${THREADS:-K::kThreads}, sizeof(K::SharedMemory), stream>>>(params, clocks);
  return launch::sentence("launch", cudaGetLastError());
}
}
extern const Timed variant_$n = {"$n", $d, $bps, $n::K::kConsumers, $n::go, $n::prepare};
EOF
nice -n 1 nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -Xptxas=-v -diag-suppress 177 -c -I../../csrc "$@" $n.cu -o $n.o > $n.said 2>&1
echo $n; grep -E "error|spill|Used|C75" $n.said | tail -4
