// gather_sum and scatter_outer: weighted sums of gathered rows, one segment per output row.
#include <algorithm>

#include "cpu/kernels.h"

namespace sarm::cpu {
namespace {

// 4 KiB of accumulators: with four 4 KiB pieces of rows they stay in a 32 KiB L1.
constexpr int64_t kBlockD = 1024;

template <class T, class Out>
struct SegmentSum {
  SARM_INLINE static void run(const float* coef, const int64_t* row, const int64_t* offset,
                              const T* matrix, Out* out, int64_t begin, int64_t end, int64_t D) {
    float acc[kBlockD];
    for (int64_t s = begin; s < end; ++s) {
      for (int64_t d0 = 0; d0 < D; d0 += kBlockD) {
        const int64_t width = std::min(kBlockD, D - d0);
        const T* base = matrix + d0;
        for (int64_t i = 0; i < width; ++i) acc[i] = 0.0f;
        int64_t e = offset[s];
        // Four rows a pass: acc is loaded and stored once for four multiply-adds.
        for (; e + 4 <= offset[s + 1]; e += 4) {
          const T* r0 = base + row[e] * D;
          const T* r1 = base + row[e + 1] * D;
          const T* r2 = base + row[e + 2] * D;
          const T* r3 = base + row[e + 3] * D;
          const float c0 = coef[e], c1 = coef[e + 1], c2 = coef[e + 2], c3 = coef[e + 3];
          for (int64_t i = 0; i < width; ++i) {
            acc[i] += (c0 * to_float(r0[i]) + c1 * to_float(r1[i])) +
                      (c2 * to_float(r2[i]) + c3 * to_float(r3[i]));
          }
        }
        for (; e < offset[s + 1]; ++e) {
          const T* r = base + row[e] * D;
          const float c = coef[e];
          for (int64_t i = 0; i < width; ++i) acc[i] += c * to_float(r[i]);
        }
        Out* o = out + s * D + d0;
        for (int64_t i = 0; i < width; ++i) store(acc[i], o + i);
      }
    }
  }
};

}  // namespace

template <class T, class Out>
void segment_sum(const float* coef, const int64_t* row, const int64_t* offset, const T* matrix,
                 Out* out, int64_t begin, int64_t end, int64_t D) {
  run_widest<SegmentSum<T, Out>>(coef, row, offset, matrix, out, begin, end, D);
}

template void segment_sum(const float*, const int64_t*, const int64_t*, const float*, float*,
                          int64_t, int64_t, int64_t);
template void segment_sum(const float*, const int64_t*, const int64_t*, const bf16*, bf16*, int64_t,
                          int64_t, int64_t);
template void segment_sum(const float*, const int64_t*, const int64_t*, const bf16*, float*,
                          int64_t, int64_t, int64_t);

void group_by_latent(const float* a, const int64_t* idx, int64_t N, int64_t K, int64_t L,
                     float* coef, int64_t* row, int64_t* offset) {
  std::fill(offset, offset + L + 1, 0);
  // offset[l + 1] counts latent l, becomes its first entry, and ends as its last + 1: no second
  // array of cursors.
  for (int64_t e = 0; e < N * K; ++e) ++offset[idx[e] + 1];
  int64_t first = 0;
  for (int64_t l = 1; l <= L; ++l) {
    const int64_t count = offset[l];
    offset[l] = first;
    first += count;
  }
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t j = 0; j < K; ++j) {
      const int64_t e = offset[idx[n * K + j] + 1]++;
      coef[e] = a[n * K + j];
      row[e] = n;
    }
  }
}

}  // namespace sarm::cpu
