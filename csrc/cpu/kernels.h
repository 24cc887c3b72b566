// The CPU kernels on raw pointers. Torch-free: the caller (bindings.cpp) has checked shapes,
// dtypes, contiguity and index ranges, and cuts the work into [begin, end) for its threads.
//
//   N  tokens (rows)      L  latents (n_latents)      D  d_model
//   K  active latents     P  heads or steering profiles
//
// All arithmetic is fp32 (or wider) whatever T is, and a row's result does not depend on how
// rows are shared among threads. T is float or bf16; tensors are contiguous.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace sarm::cpu {

// out[n, p] = sum_j vals[n, j] * w_head[p, idx[n, j]]
// vals, idx (N, K); w_head (P, L); out (N, P). Rows [begin, end).
template <class T>
void sparse_value(const float* vals, const int64_t* idx, const T* w_head, float* out, int64_t begin,
                  int64_t end, int64_t K, int64_t L, int64_t P);

// out[n, j] = <y[n], w[idx[n, j]]>
// y (N, D); idx (N, K); w (L, D); out (N, K). Rows [begin, end). scratch: D floats.
template <class T>
void gather_dot(const T* y, const int64_t* idx, const T* w, float* out, float* scratch,
                int64_t begin, int64_t end, int64_t K, int64_t D);

// out[s] = sum over e in [offset[s], offset[s + 1]) of coef[e] * matrix[row[e]]
// Segments [begin, end) of out (S, D); matrix (rows, D). Both gather_sum (a segment is the K
// latents of a token) and scatter_outer (a segment is the tokens of a latent) are this sum.
template <class T, class Out>
void segment_sum(const float* coef, const int64_t* row, const int64_t* offset, const T* matrix,
                 Out* out, int64_t begin, int64_t end, int64_t D);

// Stable counting sort of the N * K entries by latent: entry e of the result stands for
// coef[e] * y[row[e]], and latent l owns entries [offset[l], offset[l + 1]). offset: L + 1.
void group_by_latent(const float* a, const int64_t* idx, int64_t N, int64_t K, int64_t L,
                     float* coef, int64_t* row, int64_t* offset);

}  // namespace sarm::cpu
