// SPDX-License-Identifier: Apache-2.0
// The kernels of the tail on a GPU.
#include "launch/tail_params.h"
#include "launch/tensor_core_launch.h"

namespace vsa::launch {
namespace {

constexpr int kThreads = 256;  // of kernels without products

template <class Element>
__global__ void __launch_bounds__(kThreads)
    round_means_kernel(const __grid_constant__ RoundMeansParams params) {
  vsa::RoundMeans<Element>::run(params, int64_t{blockIdx.x} * kThreads + threadIdx.x);
}

__global__ void __launch_bounds__(kThreads)
    sum_parts_kernel(const __grid_constant__ SumPartsParams params) {
  const int64_t lane = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (lane < params.numbers) SumPartsParams::run(params, lane);
}

unsigned blocks(int64_t lanes) { return static_cast<unsigned>((lanes + kThreads - 1) / kThreads); }

// One block per multiprocessor, or per group of work where those are fewer.
template <class Kernel>
cudaError_t launch_groups(const typename Kernel::Params& params, int device, cudaStream_t stream) {
  constexpr int kBytes = sizeof(typename Kernel::SharedMemory);
  int multiprocessors = 0;
  cudaError_t error = prepare<Kernel>(device, kBytes, multiprocessors);
  if (error != cudaSuccess) return error;
  const int groups = Kernel::work_of(params).size;
  persistent_kernel<Kernel>
      <<<std::min(groups, multiprocessors), Kernel::kThreads, kBytes, stream>>>(params);
  return cudaGetLastError();
}

template <class Epilogue>
std::string launch_forward(const TailForward& call, int device, void* stream) {
  TailForwardParams<typename Epilogue::Params> params{};
  if (const std::string error = make_params(params, call, encode); !error.empty()) return error;
  bool found = true;  // a kernel for this configuration
  const auto launch = [&](cudaStream_t stream) {
    cudaError_t error = cudaSuccess;
    found = with_config(call, [&](auto element, auto head_dim) {
      using Kernel = vsa::TailForward<TailForwardConfig<decltype(element), head_dim()>, Epilogue>;
      error = launch_groups<Kernel>(params, device, stream);
    });
    return error;
  };
  const std::string error = launch_on(device, stream, "the tail's forward kernel", launch);
  return found ? error : kNoConfig;
}

// A pass of the backward, and what comes after it in the same stream.
template <template <class> class Kernel, template <class, int> class Config, class Then>
std::string launch_backward(const TailBackward& call, int device, void* stream, Then then) {
  TailBackwardParams params{};
  if (const std::string error = make_params(params, call, encode); !error.empty()) return error;
  bool found = true;  // a kernel for this configuration
  const auto launch = [&](cudaStream_t stream) {
    cudaError_t error = cudaSuccess;
    found = with_config(call, [&](auto element, auto head_dim) {
      error = launch_groups<Kernel<Config<decltype(element), head_dim()>>>(params, device, stream);
      if (error == cudaSuccess) error = then(stream);
    });
    return error;
  };
  const std::string error = launch_on(device, stream, "a backward kernel of the tail", launch);
  return found ? error : kNoConfig;
}

}  // namespace

std::string round_means(const RoundMeans& call, int device, void* stream) {
  const RoundMeansParams params = round_means_params(call);
  bool found = true;  // a kernel for this dtype
  const auto launch = [&](cudaStream_t stream) {
    found = with_element(call.dtype, FineDtypes{}, [&](auto element) {
      round_means_kernel<decltype(element)><<<blocks(lanes(params)), kThreads, 0, stream>>>(params);
    });
    return cudaGetLastError();
  };
  const std::string error = launch_on(device, stream, "the kernel that rounds means", launch);
  return found ? error : kNoConfig;
}

std::string tail_forward(const TailForward& call, int device, void* stream) {
  return any(call.gates) ? launch_forward<GatedOutput>(call, device, stream)
                         : launch_forward<PlainOutput>(call, device, stream);
}

std::string tail_means(const TailBackward& call, int device, void* stream) {
  const SumPartsParams sums = sum_parts_params(call);
  return launch_backward<TailBackwardMeans, TailBackwardMeansConfig>(
      call, device, stream, [&](cudaStream_t stream) {
        sum_parts_kernel<<<blocks(sums.numbers), kThreads, 0, stream>>>(sums);
        return cudaGetLastError();
      });
}

std::string tail_queries(const TailBackward& call, int device, void* stream) {
  return launch_backward<TailBackwardQueries, TailBackwardQueriesConfig>(
      call, device, stream, [](cudaStream_t) { return cudaSuccess; });
}

}  // namespace vsa::launch
