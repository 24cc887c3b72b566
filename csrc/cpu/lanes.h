// Sixteen fp32 lanes and the dot product built on them. One fixed order of summation, whatever the
// instruction set and whatever else is computed beside it: a product has the same bits alone, in a
// batch, and in every op that uses it. Torch-free.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

namespace sarm::cpu {

// One AVX-512 register, two AVX2 ones, four of the baseline. Explicit lanes, because a compiler
// may not reorder a float sum into vectors by itself.
constexpr int64_t kLanes = 16;
constexpr int64_t kChains = 4;  // independent sums: one would wait for its own additions
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t LaneInts __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef uint32_t LaneBits __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t LaneHalves __attribute__((vector_size(kLanes * sizeof(uint16_t))));

SARM_INLINE void load_lanes(const float* p, Lanes* out) { std::memcpy(out, p, sizeof(*out)); }

SARM_INLINE void load_lanes(const bf16* p, Lanes* out) {
  LaneHalves halves;
  std::memcpy(&halves, p, sizeof(halves));
  const LaneBits bits = __builtin_convertvector(halves, LaneBits) << 16;
  std::memcpy(out, &bits, sizeof(*out));
}

SARM_INLINE void load_lanes(const fp16* p, Lanes* out) {
  LaneHalves halves;
  std::memcpy(&halves, p, sizeof(halves));
  const LaneBits bits = __builtin_convertvector(halves, LaneBits);
  const LaneBits magnitude = (bits & 0x7FFFu) << 13;
  Lanes scaled;
  std::memcpy(&scaled, &magnitude, sizeof(scaled));
  scaled *= kFp16Rescale;
  LaneBits wide;
  std::memcpy(&wide, &scaled, sizeof(wide));
  wide |= reinterpret_cast<LaneBits>(magnitude >= kFp16Infinity) & 0x7F800000u;
  wide |= (bits & 0x8000u) << 16;
  std::memcpy(out, &wide, sizeof(*out));
}

SARM_INLINE float sum_chains(const Lanes sum[kChains]) {
  const Lanes all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  float total = 0.0f;
  for (int64_t t = 0; t < kLanes; ++t) total += all[t];
  return total;
}

// out[r] = <x[r], w> for R rows of fp32 against one row of T, which is read and widened once.
template <int R, class T>
SARM_INLINE void dot_rows(const float* const x[R], const T* w, int64_t D, float out[R]) {
  Lanes sum[R][kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kLanes <= D; i += kChains * kLanes) {
    for (int64_t u = 0; u < kChains; ++u) {
      Lanes b;
      load_lanes(w + i + u * kLanes, &b);
      for (int r = 0; r < R; ++r) {
        Lanes a;
        load_lanes(x[r] + i + u * kLanes, &a);
        sum[r][u] += a * b;
      }
    }
  }
  for (; i + kLanes <= D; i += kLanes) {
    Lanes b;
    load_lanes(w + i, &b);
    for (int r = 0; r < R; ++r) {
      Lanes a;
      load_lanes(x[r] + i, &a);
      sum[r][0] += a * b;
    }
  }
  for (int r = 0; r < R; ++r) out[r] = sum_chains(sum[r]);
  for (; i < D; ++i) {
    const float b = to_float(w[i]);
    for (int r = 0; r < R; ++r) out[r] += x[r][i] * b;
  }
}

template <class T>
SARM_INLINE float dot(const float* x, const T* w, int64_t D) {
  float out;
  dot_rows<1>(&x, w, D, &out);
  return out;
}

}  // namespace sarm::cpu
