// scatter_outer:  out[l] = sum over entries e = (n, j) with idx[e] = l of a[e] * y[n]
//
// The caller has sorted the entries by latent, stably, so a latent's entries are one segment in the
// order of the tokens. A warp owns one slice of one latent and adds up its segment in registers:
// no float atomics. Popular latents own most entries, and one warp would walk through N of them
// alone; a segment of more than kPiece entries is cut into pieces, summed by as many warps into
// `partial`, and a second pass adds a latent's pieces in their order. Cuts depend on the segments
// alone. For one slice all of y (N x 512 bytes) is read from L2.
//
//   N tokens    K active latents    L latents    D d_model    E = N * K entries
#include <algorithm>

#include "cuda/row_slice.h"

namespace sarm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kScanThreads = 1024;
constexpr int64_t kPiece = 512;
constexpr int64_t kPartialBytes = int64_t{64} << 20;

// There are fewer than E / kPiece long segments, and each has one piece that is not full.
int64_t max_pieces(int64_t E) { return 2 * (E / kPiece); }

// Slices summed by one launch: all, or as many as partial sums of kPartialBytes allow.
template <class T>
int64_t slices_per_launch(int64_t E, int64_t D) {
  const int64_t slice_bytes = std::max<int64_t>(1, max_pieces(E)) * kSliceColumns<T> * 4;
  return std::min(slices<T>(D), std::max<int64_t>(1, kPartialBytes / slice_bytes));
}

// Where the workspace's arrays begin.
struct Layout {
  size_t coef, offset, piece, partial, end;
};

template <class T>
Layout layout(int64_t E, int64_t L, int64_t D) {
  const auto padded = [](int64_t bytes) { return static_cast<size_t>((bytes + 15) / 16 * 16); };
  Layout at{};
  at.offset = at.coef + padded(E * 4);
  at.piece = at.offset + padded((L + 1) * 8);
  at.partial = at.piece + padded((L + 1) * 8);
  at.end = at.partial + max_pieces(E) * slices_per_launch<T>(E, D) * kSliceColumns<T> * 4;
  return at;
}

// The first position in sorted[0 .. n) whose value is not less than `value`; n if there is none.
template <class V>
__device__ __forceinline__ int64_t lower_bound(const V* sorted, int64_t n, int64_t value) {
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (sorted[middle] < value) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// coef[e] = a[order[e]], and order[e] becomes the token: one division an entry, not one a slice.
__global__ void __launch_bounds__(kThreads)
    permute_kernel(const float* __restrict__ a, int64_t* __restrict__ order,
                   float* __restrict__ coef, int64_t E, int64_t K) {
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; e < E;
       e += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t entry = order[e];
    coef[e] = a[entry];
    order[e] = entry / K;
  }
}

// Latent l owns the sorted entries [offset[l], offset[l + 1]).
__global__ void __launch_bounds__(kThreads)
    offset_kernel(const int32_t* __restrict__ latent, int64_t* __restrict__ offset, int64_t E,
                  int64_t L) {
  for (int64_t l = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; l <= L;
       l += static_cast<int64_t>(gridDim.x) * kThreads) {
    offset[l] = lower_bound(latent, E, l);
  }
}

__device__ __forceinline__ int64_t pieces(const int64_t* offset, int64_t l) {
  const int64_t count = offset[l + 1] - offset[l];
  return count <= kPiece ? 0 : (count + kPiece - 1) / kPiece;
}

// Long latent l owns the pieces [piece[l], piece[l + 1]): a prefix sum by one block. A thread sums
// a stretch of L / 1,024 latents, the block scans the sums, the thread writes its stretch.
__global__ void __launch_bounds__(kScanThreads)
    piece_kernel(const int64_t* __restrict__ offset, int64_t* __restrict__ piece, int64_t L) {
  SARM_SHARED(int64_t, warp_total, kWarp);
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int64_t stretch = (L + kScanThreads - 1) / kScanThreads;
  const int64_t begin = min(thread * stretch, L), end = min(begin + stretch, L);
  int64_t sum = 0;
  for (int64_t l = begin; l < end; ++l) sum += pieces(offset, l);
  int64_t before = sum;  // of all stretches up to this one, first in the warp, then in the block
  for (int step = 1; step < kWarp; step *= 2) {
    const int64_t other = __shfl_up_sync(kFullMask, before, step);
    if (lane >= step) before += other;
  }
  if (lane == kWarp - 1) warp_total[warp] = before;
  before -= sum;
  __syncthreads();
  for (int w = 0; w < warp; ++w) before += warp_total[w];
  for (int64_t l = begin; l < end; ++l) {
    piece[l] = before;
    before += pieces(offset, l);
  }
  if (thread == kScanThreads - 1) piece[L] = before;
}

struct Segments {
  const float* coef;      // (E)
  const int64_t* token;   // (E)
  const int64_t* offset;  // (L + 1)
  const int64_t* piece;   // (L + 1)
  float* partial;         // (max_pieces, columns)
  int64_t L, D, max_pieces, columns;
  int64_t first_column;  // of this launch's slices
};

// A warp sums one slice of one piece of a long segment into partial, or of a short one into out.
// Pieces come first: they are the longest tasks, and nothing should wait for them at the end.
template <class T, class Out, bool kVector>
__global__ void __launch_bounds__(kThreads, kMinBlocks<kVector>)
    segment_kernel(Segments s, const T* __restrict__ y, Out* __restrict__ out, int64_t tasks) {
  using Slice = RowSlice<T, kVector>;
  const int64_t items = s.max_pieces + s.L;
  for (int64_t task = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; task < tasks;
       task += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t item = task % items, column = task / items * kSliceColumns<T>;
    int64_t latent = item - s.max_pieces, skipped = 0;
    if (item < s.max_pieces) {
      if (item >= s.piece[s.L]) continue;
      latent = lower_bound(s.piece, s.L + 1, item + 1) - 1;
      skipped = (item - s.piece[latent]) * kPiece;
    } else if (s.piece[latent + 1] != s.piece[latent]) {
      continue;
    }
    const int64_t begin = s.offset[latent] + skipped;
    const int64_t end = min(begin + kPiece, s.offset[latent + 1]);
    const Slice slice{s.first_column + column, s.D, static_cast<int>(threadIdx.x % kWarp)};
    float sum[Slice::kWidth] = {};
    add_rows(slice, s.coef + begin, s.token + begin, end - begin, y, sum);
    if (item >= s.max_pieces) {
      slice.store(sum, out + latent * s.D);
    } else {
      float* row = s.partial + item * s.columns + column;
#pragma unroll
      for (int i = 0; i < Slice::kWidth; ++i) row[i * kWarp + slice.lane] = sum[i];
    }
  }
}

// The second pass: a warp adds the pieces of one slice of one long latent, in their order.
template <class T, class Out, bool kVector>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(Segments s, Out* __restrict__ out, int64_t tasks) {
  using Slice = RowSlice<T, kVector>;
  for (int64_t task = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; task < tasks;
       task += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t item = task % s.max_pieces, column = task / s.max_pieces * kSliceColumns<T>;
    if (item >= s.piece[s.L]) continue;
    const int64_t latent = lower_bound(s.piece, s.L + 1, item + 1) - 1;
    if (s.piece[latent] != item) continue;  // only a latent's first piece does the work
    const Slice slice{s.first_column + column, s.D, static_cast<int>(threadIdx.x % kWarp)};
    float sum[Slice::kWidth] = {};
    for (int64_t p = item; p < s.piece[latent + 1]; ++p) {
      const float* row = s.partial + p * s.columns + column;
#pragma unroll
      for (int i = 0; i < Slice::kWidth; ++i) sum[i] += row[i * kWarp + slice.lane];
    }
    slice.store(sum, out + latent * s.D);
  }
}

template <class T, class Out, bool kVector>
void sum_segments(const ScatterOuter& args, Segments s, Stream stream) {
  const auto blocks = [](int64_t tasks) { return (tasks + kWarps - 1) / kWarps; };
  const int64_t step = slices_per_launch<T>(args.N * args.K, s.D), total = slices<T>(s.D);
  s.columns = step * kSliceColumns<T>;
  Out* out = static_cast<Out*>(args.out);
  for (int64_t first = 0; first < total; first += step) {
    const int64_t width = std::min(step, total - first);
    s.first_column = first * kSliceColumns<T>;
    const int64_t tasks = width * (s.max_pieces + s.L), sums = width * s.max_pieces;
    launch("scatter_outer", segment_kernel<T, Out, kVector>, blocks(tasks), kThreads, 0, stream, s,
           static_cast<const T*>(args.y), out, tasks);
    launch("scatter_outer", combine_kernel<T, Out, kVector>, blocks(sums), kThreads, 0, stream, s,
           out, sums);
  }
}

}  // namespace

size_t scatter_outer_workspace(int64_t E, int64_t L, int64_t D, Dtype dtype) {
  size_t bytes = 0;
  with_element(dtype, [&](auto element) { bytes = layout<decltype(element)>(E, L, D).end; });
  return bytes;
}

void scatter_outer(const ScatterOuter& args, Stream stream) {
  const int64_t E = args.N * args.K, L = args.L;
  with_element(args.dtype, [&](auto element) {
    using T = decltype(element);
    const Layout at = layout<T>(E, L, args.D);
    char* workspace = static_cast<char*>(args.workspace);
    float* coef = reinterpret_cast<float*>(workspace + at.coef);
    int64_t* offset = reinterpret_cast<int64_t*>(workspace + at.offset);
    int64_t* piece = reinterpret_cast<int64_t*>(workspace + at.piece);
    launch("scatter_outer", permute_kernel, (E + kThreads - 1) / kThreads, kThreads, 0, stream,
           args.a, args.order, coef, E, args.K);
    launch("scatter_outer", offset_kernel, (L + kThreads) / kThreads, kThreads, 0, stream,
           args.latent, offset, E, L);
    launch("scatter_outer", piece_kernel, 1, kScanThreads, 0, stream, offset, piece, L);
    Segments s{
        coef, args.order, offset,        piece, reinterpret_cast<float*>(workspace + at.partial),
        L,    args.D,     max_pieces(E), 0,     0};
    with_alignment(
        rows_are_aligned<T>(args.D, static_cast<const T*>(args.y), static_cast<const T*>(args.out)),
        [&](auto aligned) {
          if (args.out_dtype == Dtype::fp32) {
            sum_segments<T, float, aligned.value>(args, s, stream);
          } else {
            sum_segments<T, T, aligned.value>(args, s, stream);
          }
        });
  });
}

}  // namespace sarm::cuda
