// Rows to int8: plain, after RMSNorm, after the SiLU gate. A row is widened to fp32 in cache and
// then passed over a few times; next to the integer product this is a few percent.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/int8.h"

namespace sarm::cpu {
namespace {

constexpr float kSteps = 127.0f;
constexpr int32_t kInfinityBits = 0x7F800000;
// Rows below this are zeros: 127 / absmax must not overflow, and fp32 is denormal there anyway.
constexpr float kSmallest = 0x1p-120f;
// Adding 1.5 * 2^23 leaves the integer nearest to |v| < 2^22, half to even, in the low bits.
constexpr float kRound = 12582912.0f;
constexpr int32_t kRoundBits = 0x4B400000;

template <class T>
SARM_INLINE void widen(const T* __restrict x, float* __restrict row, int64_t D) {
  for (int64_t i = 0; i < D; ++i) row[i] = to_float(x[i]);
}

SARM_INLINE int32_t bits_of(float v) {
  int32_t bits;
  std::memcpy(&bits, &v, sizeof(bits));
  return bits;
}

// As integers the bits of |v| are ordered like |v|, with NaN above infinity.
SARM_INLINE int32_t absmax_bits(const float* row, int64_t D) {
  int32_t best = 0;
  for (int64_t i = 0; i < D; ++i) best = std::max(best, bits_of(row[i]) & 0x7FFFFFFF);
  return best;
}

// row is overwritten; the true row is `gain` times it.
SARM_INLINE void quantize(float* __restrict row, float gain, int8_t* __restrict q, float* scale,
                          int64_t D) {
  const int32_t bits = absmax_bits(row, D);
  float absmax;
  std::memcpy(&absmax, &bits, sizeof(absmax));
  if (bits >= kInfinityBits || absmax < kSmallest) {
    *scale = bits >= kInfinityBits ? std::numeric_limits<float>::quiet_NaN() : 0.0f;
    std::memset(q, 0, D);
    return;
  }
  *scale = absmax / kSteps * gain;
  const float inverse = kSteps / absmax;
  for (int64_t i = 0; i < D; ++i) row[i] *= inverse;
  end_pass();
  for (int64_t i = 0; i < D; ++i) q[i] = static_cast<int8_t>(bits_of(row[i] + kRound) - kRoundBits);
}

// Sixteen fixed chains in fp64. Squares of fp32 are exact there, contracted or not.
SARM_INLINE double sum_of_squares(const float* row, int64_t D) {
  constexpr int64_t kChains = 16;
  double sum[kChains] = {};
  int64_t i = 0;
  for (; i + kChains <= D; i += kChains) {
    for (int64_t u = 0; u < kChains; ++u) {
      const double v = row[i + u];
      sum[u] += v * v;
    }
  }
  for (int64_t u = 0; i < D; ++i, ++u) sum[u] += static_cast<double>(row[i]) * row[i];
  double total = 0.0;
  for (int64_t u = 0; u < kChains; ++u) total += sum[u];
  return total;
}

// e^v for |v| <= 87, 2 ulp: 2^n e^r with |r| <= ln(2) / 2, Cephes' polynomial. Contracted by name:
// where the machine has no fused multiply-add (x86-64 before 2013) this is a slow library call.
SARM_INLINE float exponential(float v) {
  const float shifted = __builtin_fmaf(v, 1.44269504088896341f, kRound);
  const float n = shifted - kRound;
  float r = __builtin_fmaf(n, -0.693359375f, v);
  r = __builtin_fmaf(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = __builtin_fmaf(p, r, 1.3981999507e-3f);
  p = __builtin_fmaf(p, r, 8.3334519073e-3f);
  p = __builtin_fmaf(p, r, 4.1665795894e-2f);
  p = __builtin_fmaf(p, r, 1.6666665459e-1f);
  p = __builtin_fmaf(p, r, 5.0000001201e-1f);
  p = __builtin_fmaf(p, r * r, r) + 1.0f;
  const uint32_t power = static_cast<uint32_t>(bits_of(shifted) - kRoundBits + 127) << 23;
  float two_to_n;
  std::memcpy(&two_to_n, &power, sizeof(two_to_n));
  return p * two_to_n;  // exact, so `1 + exponential(v)` has one rounding either way
}

// Below -87 silu(v) is less than 2e-36 and taken as v * e^-87; a NaN stays one.
SARM_INLINE float silu(float v) {
  const float low = v < -87.0f ? -87.0f : v;
  const float bounded = low > 87.0f ? 87.0f : low;
  return v / (1.0f + exponential(-bounded));
}

// row <- sqrt(block) * (H_block (x) I) row; the parts of a row are added and subtracted whole, so
// no lane ever meets its neighbour.
SARM_INLINE void hadamard(float* row, int64_t D, int64_t block) {
  const int64_t part = block > 0 ? D / block : D;
  for (int64_t half = part; half < D; half *= 2) {
    for (int64_t first = 0; first < D; first += 2 * half) {
      float* __restrict a = row + first;
      float* __restrict b = a + half;
      for (int64_t i = 0; i < half; ++i) {
        const float sum = a[i] + b[i], difference = a[i] - b[i];
        a[i] = sum;
        b[i] = difference;
      }
    }
  }
}

template <class T>
struct QuantizeRows {
  SARM_INLINE static void run(const T* x, int8_t* q, float* scale, float* row, int64_t begin,
                              int64_t end, int64_t D) {
    for (int64_t n = begin; n < end; ++n) {
      widen(x + n * D, row, D);
      quantize(row, 1.0f, q + n * D, scale + n, D);
    }
  }
};

template <class T>
struct RmsnormQuantize {
  SARM_INLINE static void run(const T* x, const float* weight, double eps, int8_t* q, float* scale,
                              float* row, int64_t begin, int64_t end, int64_t D) {
    for (int64_t n = begin; n < end; ++n) {
      widen(x + n * D, row, D);
      const double mean = sum_of_squares(row, D) / static_cast<double>(D);
      const float factor = static_cast<float>(1.0 / __builtin_sqrt(mean + eps));
      for (int64_t i = 0; i < D; ++i) row[i] *= factor;
      if (weight != nullptr) {
        for (int64_t i = 0; i < D; ++i) row[i] *= weight[i];
      }
      quantize(row, 1.0f, q + n * D, scale + n, D);
    }
  }
};

template <class T>
struct SiluMulQuantize {
  SARM_INLINE static void run(const T* gate_up, int8_t* q, float* scale, float* row, int64_t begin,
                              int64_t end, int64_t F, int64_t block) {
    const float gain = static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(block)));
    float* up = row + F;
    for (int64_t n = begin; n < end; ++n) {
      widen(gate_up + n * 2 * F, row, 2 * F);
      for (int64_t i = 0; i < F; ++i) row[i] = silu(row[i]);
      for (int64_t i = 0; i < F; ++i) row[i] *= up[i];
      end_pass();
      hadamard(row, F, block);
      quantize(row, gain, q + n * F, scale + n, F);
    }
  }
};

}  // namespace

template <class T>
void quantize_rows(const T* x, int8_t* q, float* scale, int64_t begin, int64_t end, int64_t D) {
  std::vector<float> row(D);
  run_widest<QuantizeRows<T>>(x, q, scale, row.data(), begin, end, D);
}

template <class T>
void rmsnorm_quantize(const T* x, const float* weight, double eps, int8_t* q, float* scale,
                      int64_t begin, int64_t end, int64_t D) {
  std::vector<float> row(D);
  run_widest<RmsnormQuantize<T>>(x, weight, eps, q, scale, row.data(), begin, end, D);
}

template <class T>
void silu_mul_quantize(const T* gate_up, int8_t* q, float* scale, int64_t begin, int64_t end,
                       int64_t F, int64_t block) {
  std::vector<float> row(2 * F);
  run_widest<SiluMulQuantize<T>>(gate_up, q, scale, row.data(), begin, end, F, block);
}

#define SARM_INSTANTIATE(T)                                                                \
  template void quantize_rows(const T*, int8_t*, float*, int64_t, int64_t, int64_t);       \
  template void rmsnorm_quantize(const T*, const float*, double, int8_t*, float*, int64_t, \
                                 int64_t, int64_t);                                        \
  template void silu_mul_quantize(const T*, int8_t*, float*, int64_t, int64_t, int64_t, int64_t);
SARM_INSTANTIATE(float)
SARM_INSTANTIATE(bf16)
SARM_INSTANTIATE(fp16)
#undef SARM_INSTANTIATE

}  // namespace sarm::cpu
