// sparse_value and gather_dot: every output element reads K (or one) gathered weights.
#include "cpu/kernels.h"
#include "cpu/lanes.h"

namespace sarm::cpu {
namespace {

template <class T>
struct SparseValue {
  SARM_INLINE static void run(const float* vals, const int64_t* idx, const T* w_head, float* out,
                              int64_t begin, int64_t end, int64_t K, int64_t L, int64_t P) {
    for (int64_t n = begin; n < end; ++n) {
      const float* v = vals + n * K;
      const int64_t* i = idx + n * K;
      for (int64_t p = 0; p < P; ++p) {
        const T* w = w_head + p * L;
        // A reward is one number out of K products: fp64 costs nothing next to the gather and
        // leaves a single rounding, so contributions add up to the reward.
        double sum[4] = {};  // four chains: one would wait for its own additions
        int64_t j = 0;
        for (; j + 4 <= K; j += 4) {
          for (int64_t u = 0; u < 4; ++u) {
            sum[u] += static_cast<double>(v[j + u]) * to_float(w[i[j + u]]);
          }
        }
        for (; j < K; ++j) sum[0] += static_cast<double>(v[j]) * to_float(w[i[j]]);
        out[n * P + p] = static_cast<float>((sum[0] + sum[1]) + (sum[2] + sum[3]));
      }
    }
  }
};

template <class T>
struct GatherDot {
  SARM_INLINE static void run(const T* y, const int64_t* idx, const T* w, float* out,
                              float* scratch, int64_t begin, int64_t end, int64_t K, int64_t D) {
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t i = 0; i < D; ++i)
        scratch[i] = to_float(y[n * D + i]);  // widened once, used K times
      for (int64_t j = 0; j < K; ++j) out[n * K + j] = dot(scratch, w + idx[n * K + j] * D, D);
    }
  }
};

}  // namespace

template <class T>
void sparse_value(const float* vals, const int64_t* idx, const T* w_head, float* out, int64_t begin,
                  int64_t end, int64_t K, int64_t L, int64_t P) {
  run_widest<SparseValue<T>>(vals, idx, w_head, out, begin, end, K, L, P);
}

template <class T>
void gather_dot(const T* y, const int64_t* idx, const T* w, float* out, float* scratch,
                int64_t begin, int64_t end, int64_t K, int64_t D) {
  run_widest<GatherDot<T>>(y, idx, w, out, scratch, begin, end, K, D);
}

template void sparse_value(const float*, const int64_t*, const float*, float*, int64_t, int64_t,
                           int64_t, int64_t, int64_t);
template void sparse_value(const float*, const int64_t*, const bf16*, float*, int64_t, int64_t,
                           int64_t, int64_t, int64_t);
template void gather_dot(const float*, const int64_t*, const float*, float*, float*, int64_t,
                         int64_t, int64_t, int64_t);
template void gather_dot(const bf16*, const int64_t*, const bf16*, float*, float*, int64_t, int64_t,
                         int64_t, int64_t);

}  // namespace sarm::cpu
