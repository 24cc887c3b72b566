// Element types of the kernels and their exact conversion to fp32. Torch-free.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/simd.h"

namespace sarm {

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

// An fp16 number's exponent and fraction, moved to their place in fp32, are 2^112 too small; this
// also makes fp16's subnormals right. Infinity and NaN need fp32's exponent of ones besides.
constexpr float kFp16Rescale = 0x1p112f;
constexpr uint32_t kFp16Infinity = 0x7C00u << 13;

SARM_INLINE float to_float(float v) { return v; }

SARM_INLINE float to_float(bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

SARM_INLINE float to_float(fp16 v) {
  const uint32_t magnitude = (v.bits & 0x7FFFu) << 13;
  float out;
  std::memcpy(&out, &magnitude, sizeof(out));
  out *= kFp16Rescale;
  uint32_t bits;
  std::memcpy(&bits, &out, sizeof(bits));
  bits |= (magnitude >= kFp16Infinity ? 0x7F800000u : 0u) | (v.bits & 0x8000u) << 16;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

SARM_INLINE void store(float v, float* out) { *out = v; }

// Round to nearest, ties to even, as PyTorch does; a NaN stays a NaN.
SARM_INLINE void store(float v, bf16* out) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof(bits));
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>(v != v ? 0x7FC0u : rounded);
}

}  // namespace sarm
