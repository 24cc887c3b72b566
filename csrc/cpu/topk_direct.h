// topk_encode without a GEMM: exact products, kept by a running bound. For a handful of rows, where
// a GEMM is slower than reading w once (it reaches 20 of 170 GFLOP/s at eight rows), and for rows
// that screening cannot decide. Torch-free.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace sarm::cpu {

constexpr int64_t kDirectRows = 8;  // rows that share one pass over w

// Room, in keys, that one row takes.
int64_t direct_stride(int64_t K);

// The K best keys (topk_key.h; all of them if there are fewer) among latents [begin, end) of R
// rows. x: R pointers to (D,) fp32; w (L, D); bias (L,). keys: R * direct_stride; count: R.
template <class T>
void direct_rows(const float* const* x, int64_t R, const T* w, const float* bias, uint64_t* keys,
                 int64_t* count, int64_t begin, int64_t end, int64_t K, int64_t D);

}  // namespace sarm::cpu
