// 8-bit kernels on raw pointers: rows to integers, and the product of two integer matrices.
// Torch-free: the caller (int8.cpp) has checked shapes and dtypes and shares the work.
//
//   N  tokens (rows)      D  columns of the quantised rows (the sum's length)
//   O  output columns     F  columns of gate and of up
//
// Same bits on every instruction set, for any number of threads and any batch: sums of integers
// are exact, and where floats are summed or multiplied the order and every rounding are fixed. A
// compiler may contract a * b + c into one rounding instead of two, hence three habits here:
// products are stored before something is added to them (end_pass), are exact to begin with (fp64
// squares of fp32), or are contracted by name (fmaf).
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace sarm::cpu {

// Sums of D products of any two int8 stay below 2^31.
constexpr int64_t kInt8MaxColumns = (1 << 17) - 1;

// The stores above are done, roundings included, before anything below reads them.
SARM_INLINE void end_pass() { asm volatile("" ::: "memory"); }

// scale[n] = absmax(x[n]) / 127; q[n] = x[n] * (127 / absmax), half to even. Rows [begin, end).
template <class T>
void quantize_rows(const T* x, int8_t* q, float* scale, int64_t begin, int64_t end, int64_t D);

// The same of x[n] / sqrt(mean(x[n]^2) + eps) * weight; weight (D,) may be null: ones.
template <class T>
void rmsnorm_quantize(const T* x, const float* weight, double eps, int8_t* q, float* scale,
                      int64_t begin, int64_t end, int64_t D);

// The same of silu(gate) * up with gate_up (N, 2F) = [gate, up], after H_block (x) I_{F/block}, an
// orthonormal Hadamard transform over the `block` equal parts of a row; block divides F, power
// of two.
template <class T>
void silu_mul_quantize(const T* gate_up, int8_t* q, float* scale, int64_t begin, int64_t end,
                       int64_t F, int64_t block);

// out[n, o] = (sum_i q[n, i] w[o, i]) * scale[n] * w_scale[o] + bias[o] + residual[n, o]
// in fp32, from left to right, rounded to Out at the end. bias and residual may be null.
template <class Out>
struct Int8Linear {
  const int8_t* q;        // (N, D)
  const float* scale;     // (N,)
  const int8_t* w;        // (O, D)
  const float* w_scale;   // (O,)
  const float* bias;      // (O,)
  const float* residual;  // (N, O)
  Out* out;               // (N, O)
  int64_t N, O, D;
};

constexpr int64_t kPanel = 64;  // output columns that are packed and multiplied together

// Rows [row_begin, row_end) and panels [panel_begin, panel_end) of ceil(O / kPanel).
template <class Out>
void int8_linear(const Int8Linear<Out>& p, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                 int64_t panel_end);

}  // namespace sarm::cpu
