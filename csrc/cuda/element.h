// Element types of weights and activations, and their conversion to and from fp32.
#pragma once

#include "cuda/kernels.h"
#include "cuda/platform.h"

namespace sarm::cuda {

struct fp16 {
  uint16_t bits;
};

struct bf16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(fp16 v) { return half_to_float(v.bits); }
__device__ __forceinline__ float to_float(bf16 v) {
  return __uint_as_float(static_cast<uint32_t>(v.bits) << 16);
}

// Round to nearest, ties to even.
__device__ __forceinline__ void store(float v, float& out) { out = v; }
__device__ __forceinline__ void store(float v, fp16& out) { out.bits = float_to_half(v); }
__device__ __forceinline__ void store(float v, bf16& out) { out.bits = float_to_bfloat16(v); }

// Calls run(T{}) with the element type that dtype names.
template <class Run>
void with_element(Dtype dtype, Run run) {
  switch (dtype) {
    case Dtype::fp32:
      return run(float{});
    case Dtype::fp16:
      return run(fp16{});
    case Dtype::bf16:
      return run(bf16{});
  }
}

}  // namespace sarm::cuda
