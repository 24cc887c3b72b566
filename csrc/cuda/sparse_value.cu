// sparse_value:  out[n, p] = sum_j vals[n, j] * w_head[p, idx[n, j]]
//
// A warp owns a token and four heads: lanes stride over the K active latents, so vals and idx are
// read coalesced, and once for the four heads. The cost is the gather, a 32-byte sector for each
// weight; a head of 65,536 fp32 latents is 256 KiB and stays in L2.
//
//   N tokens    K active latents    L latents    P heads or profiles
#include <algorithm>

#include "cuda/row_slice.h"

namespace sarm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kHeads = 4;  // heads of one warp

template <class T>
__global__ void __launch_bounds__(kThreads)
    sparse_value_kernel(const float* __restrict__ vals, const int64_t* __restrict__ idx,
                        const T* __restrict__ w_head, float* __restrict__ out, int64_t N, int64_t K,
                        int64_t L, int64_t P) {
  const int lane = threadIdx.x % kWarp;
  const int64_t groups = (P + kHeads - 1) / kHeads;
  for (int64_t task = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
       task < N * groups; task += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t n = task / groups, first = task % groups * kHeads;
    float sum[kHeads] = {};
    for (int64_t j = lane; j < K; j += kWarp) {
      const float v = vals[n * K + j];
      const int64_t latent = idx[n * K + j];
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        // Past the last head the weight of the last is read again, and the sum dropped.
        const int64_t p = first + h < P ? first + h : P - 1;
        sum[h] += v * to_float(w_head[p * L + latent]);
      }
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const float total = warp_sum(sum[h]);
      if (lane == 0 && first + h < P) out[n * P + first + h] = total;
    }
  }
}

}  // namespace

void sparse_value(const float* vals, const int64_t* idx, const void* w_head, Dtype dtype,
                  float* out, int64_t N, int64_t K, int64_t L, int64_t P, Stream stream) {
  const int64_t tasks = N * ((P + kHeads - 1) / kHeads);
  with_element(dtype, [&](auto element) {
    using T = decltype(element);
    launch("sparse_value", sparse_value_kernel<T>, (tasks + kWarps - 1) / kWarps, kThreads, 0,
           stream, vals, idx, static_cast<const T*>(w_head), out, N, K, L, P);
  });
}

}  // namespace sarm::cuda
