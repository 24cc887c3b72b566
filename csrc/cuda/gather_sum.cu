// gather_sum:  out[n] = sum_j vals[n, j] * w[idx[n, j]]
//
// A warp owns one slice of one token's row and adds up the same slice of its K rows of w in
// registers. The slice is the slow axis of the grid: while all tokens work on one slice, its
// L x 512 bytes are read from L2. Reading whole rows token by token would fetch N * K * D
// elements from memory (51 GB at N = 32,768, K = 192, D = 4,096 in bf16; a slice at a time, w
// once).
//
//   N tokens    K active latents    D d_model
#include "cuda/row_slice.h"

namespace sarm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads, kMinBlocks<kVector>)
    gather_sum_kernel(const float* __restrict__ vals, const int64_t* __restrict__ idx,
                      const T* __restrict__ w, T* __restrict__ out, int64_t N, int64_t K, int64_t D,
                      int64_t tasks) {
  using Slice = RowSlice<T, kVector>;
  for (int64_t task = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; task < tasks;
       task += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t n = task % N;
    const Slice slice{task / N * kSliceColumns<T>, D, static_cast<int>(threadIdx.x % kWarp)};
    float sum[Slice::kWidth] = {};
    add_rows(slice, vals + n * K, idx + n * K, K, w, sum);
    slice.store(sum, out + n * D);
  }
}

}  // namespace

void gather_sum(const float* vals, const int64_t* idx, const void* w, Dtype dtype, void* out,
                int64_t N, int64_t K, int64_t D, Stream stream) {
  with_element(dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t tasks = N * slices<T>(D);
    with_alignment(rows_are_aligned<T>(D, w, out), [&](auto aligned) {
      launch("gather_sum", gather_sum_kernel<T, aligned.value>, (tasks + kWarps - 1) / kWarps,
             kThreads, 0, stream, vals, idx, static_cast<const T*>(w), static_cast<T*>(out), N, K,
             D, tasks);
    });
  });
}

}  // namespace sarm::cuda
