// topk_tile: folds one tile of pre-activations into the K largest of every row.
//
// The encoder's GEMM is cuBLAS's; it leaves a tile (rows, width) of fp32 products, and one block a
// row reads its stretch of the tile once. The K-th largest value seen so far is a lower bound of
// the final one, so a latent that does not beat it is dropped for good, which costs one compare.
// The few that pass go to a buffer of candidates; before a chunk might not fit, the K best are kept
// and the bound rises. A row of 65,536 latents with K = 192 passes about 192 (1 + ln(65536 / 2240))
// = 840 latents beyond the first 2,240, so selections are rare.
//
// Between two tiles of a row its K best so far wait in vals and idx, the result's own memory.
// Ties: latents come in ascending order, so one that equals the K-th best of those before it loses.
//
//   K active latents    L latents
#include <algorithm>
#include <type_traits>

#include "cuda/kernels.h"
#include "cuda/select.h"

namespace sarm::cuda {
namespace {

constexpr int kThreads = kSelectThreads;
constexpr int kItems = 4;  // latents of a thread, 16 bytes
constexpr int kChunk = kThreads * kItems;
// Room for candidates beyond K. One chunk is the least; with two, a selection is due only after
// 1,024 candidates. At K = 192 a block takes 18.5 KiB, so registers limit a multiprocessor to four
// blocks or more: while one waits at a barrier, the others' loads are on their way.
constexpr int kSlack = 2 * kChunk;
constexpr int kMaxSharedKeys = 5 * 1024;  // 40 of the 48 KiB that need no opting in

int capacity(int64_t K) { return static_cast<int>(K) + kSlack; }

// Four neighbouring latents' orders, 0 (below every value's) beyond the width.
template <bool kVector>
__device__ __forceinline__ void load(const float* pre, const float* bias, int64_t column,
                                     int64_t width, uint32_t (&order)[kItems]) {
  float v[kItems];
  if (kVector && column + kItems <= width) {
    const float4 four = *reinterpret_cast<const float4*>(pre + column);
    v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
  } else {
#pragma unroll
    for (int i = 0; i < kItems; ++i) v[i] = column + i < width ? pre[column + i] : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    order[i] = column + i < width ? value_order(v[i] + bias[column + i]) : 0;
  }
}

template <bool kVector, bool kShared>
__global__ void __launch_bounds__(kThreads, kShared ? 4 : 3)
    topk_tile_kernel(TopkTile t, int capacity) {
  SARM_SHARED(SelectState, state, 1);
  SelectState& s = state[0];
  uint64_t* keys = kShared ? dynamic_shared<uint64_t>()
                           : t.workspace + static_cast<int64_t>(blockIdx.x) * capacity;
  const int K = static_cast<int>(t.K), thread = threadIdx.x;
  const int seen = static_cast<int>(min(t.first, t.K));
  const float* bias = t.bias + t.first;

  for (int64_t row = blockIdx.x; row < t.rows; row += gridDim.x) {
    const float* pre = t.pre + row * t.stride;
    float* vals = t.vals + row * t.K;
    int64_t* idx = t.idx + row * t.K;

    // The best of the tiles before, and their bound; with fewer than K of them everything passes.
    if (thread == 0) {
      s.count = seen;
      s.bound = seen == K ? kNanOrder : 0;
    }
    __syncthreads();
    uint32_t worst = kNanOrder;
    for (int i = thread; i < seen; i += kThreads) {
      const uint32_t order = value_order(vals[i]);
      keys[i] = make_key(order, static_cast<uint32_t>(idx[i]));
      worst = min(worst, order);
    }
    worst = __reduce_min_sync(kFullMask, worst);
    if (thread % kWarp == 0) atomicMin(&s.bound, worst);
    __syncthreads();
    uint32_t bound = s.bound;

    uint32_t order[kItems], next[kItems];
    load<kVector>(pre, bias, thread * kItems, t.width, order);
#pragma unroll 1
    for (int64_t start = 0; start < t.width; start += kChunk) {
      const int64_t column = start + thread * kItems;
      load<kVector>(pre, bias, column + kChunk, t.width, next);  // in flight during this chunk
      bool passes = false;
#pragma unroll
      for (int i = 0; i < kItems; ++i) passes |= order[i] > bound;
      int end = 0;
      if (__any_sync(kFullMask, passes)) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          const auto latent = static_cast<uint32_t>(t.first + column + i);
          end = max(end, append(keys, s, order[i] > bound, make_key(order[i], latent)));
        }
      }
      // The last warp to append knows the count, so this barrier also tells whether the buffer
      // could overflow in the next chunk. After the last chunk K candidates may be left.
      const bool overflow = __syncthreads_or(end > capacity - kChunk) != 0;
      if (overflow || (start + kChunk >= t.width && s.count > K)) {
        keep_best(keys, K, s);
        bound = s.bound;
      }
#pragma unroll
      for (int i = 0; i < kItems; ++i) order[i] = next[i];
    }

    const int kept = s.count;
    const bool last = t.first + t.width == t.L;
    if (last) sort_descending(keys, kept);
    for (int i = thread; i < kept; i += kThreads) {
      const float v = order_value(key_order(keys[i]));
      vals[i] = last && t.relu && v < 0.0f ? 0.0f : v;
      idx[i] = key_index(keys[i]);
    }
    __syncthreads();  // the next row starts the state and the keys anew
  }
}

}  // namespace

int64_t topk_workspace_keys(int64_t K) { return capacity(K) <= kMaxSharedKeys ? 0 : capacity(K); }

void topk_tile(const TopkTile& tile, Stream stream) {
  const auto aligned = [](const float* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool vector = aligned(tile.pre) && tile.stride % kItems == 0;
  const bool shared = topk_workspace_keys(tile.K) == 0;
  const auto run = [&](auto kernel) {
    const size_t bytes = shared ? capacity(tile.K) * sizeof(uint64_t) : 0;
    launch("topk_tile", kernel, tile.rows, kThreads, bytes, stream, tile, capacity(tile.K));
  };
  if (shared) {
    vector ? run(topk_tile_kernel<true, true>) : run(topk_tile_kernel<false, true>);
  } else {
    vector ? run(topk_tile_kernel<true, false>) : run(topk_tile_kernel<false, false>);
  }
}

}  // namespace sarm::cuda
