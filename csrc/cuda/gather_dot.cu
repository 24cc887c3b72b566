// gather_dot:  out[n, j] = <y[n], w[idx[n, j]]>
//
// A warp owns four active latents of one token: a slice of y[n] is loaded once and multiplied with
// the slices of four rows of w, whose loads are in flight together. As in gather_sum, w should be
// read from L2: D is cut into ranges of which L rows fit in 32 MiB, one launch after the other, and
// each adds its part to out in that order. The cut depends on L and D alone, so a row's bits do not
// depend on its batch. Adding costs N * K * 8 bytes a range (50 MB at N = 32,768, K = 192), reading
// w from memory instead of L2 would cost N * K * 512 bytes a slice.
//
//   N tokens    K active latents    L latents    D d_model
#include <algorithm>

#include "cuda/row_slice.h"

namespace sarm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kGroup = 4;  // active latents of one warp; eight would cost 80 registers and spill
constexpr int64_t kL2Bytes = int64_t{32} << 20;

// Columns [begin, end) of the dot products; the first range starts the sums.
template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads, kMinBlocks<kVector>)
    gather_dot_kernel(const T* __restrict__ y, const int64_t* __restrict__ idx,
                      const T* __restrict__ w, float* __restrict__ out, int64_t K, int64_t D,
                      int64_t begin, int64_t end, int64_t tasks) {
  using Slice = RowSlice<T, kVector>;
  const int lane = threadIdx.x % kWarp;
  const int64_t groups = (K + kGroup - 1) / kGroup;
  for (int64_t task = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; task < tasks;
       task += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t n = task / groups, first = task % groups * kGroup;
    const T* rows[kGroup];
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      // Past the last latent the last is computed again, and not stored.
      const int64_t j = first + g < K ? first + g : K - 1;
      rows[g] = w + idx[n * K + j] * D;
    }
    float sum[kGroup] = {};
#pragma unroll 1  // the rows' loads are enough in flight; unrolled it spills
    for (int64_t column = begin; column < end; column += kSliceColumns<T>) {
      const Slice slice{column, D, lane};
      typename Slice::Pack pack[kGroup];
#pragma unroll
      for (int g = 0; g < kGroup; ++g) pack[g] = slice.fetch(rows[g]);
      const typename Slice::Pack ours = slice.fetch(y + n * D);
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
#pragma unroll
        for (int e = 0; e < Slice::kWidth; ++e) {
          const float product = to_float(ours.element[e]) * to_float(pack[g].element[e]);
          if (slice.inside(e)) sum[g] += product;
        }
      }
    }
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      const float total = warp_sum(sum[g]);
      const int64_t j = first + g;
      if (lane == g && j < K) out[n * K + j] = begin == 0 ? total : out[n * K + j] + total;
    }
  }
}

}  // namespace

void gather_dot(const void* y, const int64_t* idx, const void* w, Dtype dtype, float* out,
                int64_t N, int64_t K, int64_t L, int64_t D, Stream stream) {
  const int64_t tasks = N * ((K + kGroup - 1) / kGroup);
  with_element(dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t slice_bytes = std::max<int64_t>(1, L) * kSliceColumns<T> * sizeof(T);
    const int64_t range = std::max<int64_t>(1, kL2Bytes / slice_bytes) * kSliceColumns<T>;
    with_alignment(rows_are_aligned<T>(D, y, w), [&](auto aligned) {
      // At least once: for D = 0 the sums are zero.
      for (int64_t begin = 0; begin == 0 || begin < D; begin += range) {
        launch("gather_dot", gather_dot_kernel<T, aligned.value>, (tasks + kWarps - 1) / kWarps,
               kThreads, 0, stream, static_cast<const T*>(y), idx, static_cast<const T*>(w), out, K,
               D, begin, std::min(begin + range, D), tasks);
      }
    });
  });
}

}  // namespace sarm::cuda
