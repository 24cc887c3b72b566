// Element types of the kernels and their exact conversion to fp32. Torch-free.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/simd.h"

namespace sarm {

struct bf16 {
  uint16_t bits;
};

SARM_INLINE float to_float(float v) { return v; }

SARM_INLINE float to_float(bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float out;
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
