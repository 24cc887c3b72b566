// The CUDA kernels on raw device pointers. Torch-free: the caller (bindings.cpp) has checked
// shapes, dtypes and contiguity, and allocates the workspaces. Everything is enqueued on `stream`;
// nothing waits for the device. Indices must be in range: they are not checked on the device.
//
//   N  tokens (rows)      L  latents (n_latents)      D  d_model
//   K  active latents     P  heads or steering profiles
//
// Weights and activations are fp32, fp16 or bf16 (`Dtype`), sums are fp32. No float atomics: every
// result has the same bits in every run.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace sarm::cuda {

using Stream = CUstream_st*;  // cudaStream_t, without CUDA's headers

enum class Dtype { fp32, fp16, bf16 };

// out[n, p] = sum_j vals[n, j] * w_head[p, idx[n, j]]
// vals, idx (N, K); w_head (P, L); out (N, P).
void sparse_value(const float* vals, const int64_t* idx, const void* w_head, Dtype dtype,
                  float* out, int64_t N, int64_t K, int64_t L, int64_t P, Stream stream);

// out[n] = sum_j vals[n, j] * w[idx[n, j]]
// vals, idx (N, K); w (L, D); out (N, D), rounded once to the dtype of w.
void gather_sum(const float* vals, const int64_t* idx, const void* w, Dtype dtype, void* out,
                int64_t N, int64_t K, int64_t D, Stream stream);

// out[n, j] = <y[n], w[idx[n, j]]>
// y (N, D); idx (N, K); w (L, D); out (N, K).
void gather_dot(const void* y, const int64_t* idx, const void* w, Dtype dtype, float* out,
                int64_t N, int64_t K, int64_t L, int64_t D, Stream stream);

// out[l] = sum over entries e = (n, j) with idx[e] = l, in the order of e, of a[e] * y[n]
// y (N, D); out (L, D) in fp32 or in the dtype of y. `latent` is idx sorted (stably) and `order`
// the entry that each sorted one was; `order` is overwritten. E = N * K entries.
struct ScatterOuter {
  const float* a;         // (E)
  const int32_t* latent;  // (E)
  int64_t* order;         // (E)
  const void* y;          // (N, D)
  void* out;              // (L, D)
  void* workspace;        // scatter_outer_workspace(E, L, D, dtype) bytes
  Dtype dtype, out_dtype;
  int64_t N, K, L, D;
};
void scatter_outer(const ScatterOuter& args, Stream stream);
size_t scatter_outer_workspace(int64_t E, int64_t L, int64_t D, Dtype dtype);

// The K largest of pre[r, c] + bias[first + c] and of what vals and idx hold from the tiles before
// (tile `first` = 0 starts a row). After the tile that ends at L, vals and idx are the result: in
// descending order, equal values lowest index first, NaN on top; with `relu` clamped at 0.
struct TopkTile {
  const float* pre;     // (rows, width), rows are `stride` apart
  const float* bias;    // (L)
  float* vals;          // (rows, K)
  int64_t* idx;         // (rows, K)
  uint64_t* workspace;  // rows * topk_workspace_keys(K) keys, or null if that is 0
  int64_t rows, width, stride, first;
  int64_t K, L;
  bool relu;
};
void topk_tile(const TopkTile& tile, Stream stream);
// Keys of a row that do not fit in shared memory.
int64_t topk_workspace_keys(int64_t K);

}  // namespace sarm::cuda
