// A warp's slice of a matrix row: 512 bytes, 16 a lane. The three gather kernels walk over rows in
// slices, so that for one slice all rows together stay in L2 while tokens reuse them: 65,536 rows
// x 512 bytes are 34 MB, an H100 has 50 MB.
//
// With kVector a lane loads 16 neighbouring bytes at once; that needs 16-byte aligned rows. Without
// it a lane takes single elements a warp's width apart, and any D and alignment will do.
#pragma once

#include <cstddef>
#include <type_traits>

#include "cuda/element.h"

namespace sarm::cuda {

template <class T>
constexpr int kLaneElements = 16 / sizeof(T);
template <class T>
constexpr int kSliceColumns = kWarp * kLaneElements<T>;

template <class T>
int64_t slices(int64_t D) {
  return (D + kSliceColumns<T> - 1) / kSliceColumns<T>;
}

// Whether rows of D elements at these addresses are 16-byte aligned.
template <class T, class... Pointers>
bool rows_are_aligned(int64_t D, const Pointers*... rows) {
  return D % kLaneElements<T> == 0 && ((reinterpret_cast<uintptr_t>(rows) % 16 == 0) && ...);
}

// Width elements a lane, of which T gave the number; Out may be wider than T.
template <class T, bool kVector>
struct RowSlice {
  static constexpr int kWidth = kLaneElements<T>;
  int64_t first;  // the slice's first column
  int64_t D;
  int lane;

  __device__ __forceinline__ int64_t column(int e) const {
    return first + (kVector ? lane * kWidth + e : lane + e * kWarp);
  }

  __device__ __forceinline__ void load(const T* row, float (&v)[kWidth]) const {
    if constexpr (kVector) {
      union {
        uint4 bytes;
        T element[kWidth];
      } pack{};
      if (column(0) < D) pack.bytes = *reinterpret_cast<const uint4*>(row + column(0));
#pragma unroll
      for (int e = 0; e < kWidth; ++e) v[e] = to_float(pack.element[e]);
    } else {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) v[e] = column(e) < D ? to_float(row[column(e)]) : 0.0f;
    }
  }

  template <class Out>
  __device__ __forceinline__ void store(const float (&v)[kWidth], Out* row) const {
    if constexpr (kVector) {
      constexpr int kPacks = kWidth * sizeof(Out) / 16;
      union {
        uint4 bytes[kPacks];
        Out element[kWidth];
      } pack{};
#pragma unroll
      for (int e = 0; e < kWidth; ++e) cuda::store(v[e], pack.element[e]);
      if (column(0) >= D) return;
#pragma unroll
      for (int i = 0; i < kPacks; ++i) reinterpret_cast<uint4*>(row + column(0))[i] = pack.bytes[i];
    } else {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        if (column(e) < D) cuda::store(v[e], row[column(e)]);
      }
    }
  }
};

// The same bits in every lane: a butterfly adds each pair in one order only.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) v += __shfl_xor_sync(kFullMask, v, mask);
  return v;
}

// Calls run(std::true_type) or run(std::false_type).
template <class Run>
void with_alignment(bool aligned, Run run) {
  if (aligned) {
    run(std::true_type{});
  } else {
    run(std::false_type{});
  }
}

}  // namespace sarm::cuda
