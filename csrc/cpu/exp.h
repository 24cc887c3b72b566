// exp and tanh of sixteen lanes. Every lane's result depends on its own argument only, and
// exp(0) == 1 exactly. Torch-free.
#pragma once

#include "cpu/lanes.h"

namespace sarm::cpu {

constexpr float kLeastExponent = -87.0f;  // exp below this is 0: 2^-126 is the least normal number

// e^x for x <= 0, within 2 ulp; 0 below kLeastExponent. A NaN stays a NaN.
// x = n ln 2 + r with |r| <= ln(2) / 2, e^r by its Taylor polynomial.
SARM_INLINE void exp_lanes(const Lanes& x, Lanes* out) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Lanes shifted = x * 1.44269504f + kRound;
  const Lanes n = shifted - kRound;
  const Lanes r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Lanes e = r * 1.38888889e-3f + 8.33333333e-3f;
  e = e * r + 4.16666667e-2f;
  e = e * r + 1.66666667e-1f;
  e = e * r + 0.5f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  LaneBits bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 127u) << 23;  // the low bits of `shifted` are n
  Lanes power;
  std::memcpy(&power, &bits, sizeof(power));
  *out = x < kLeastExponent ? Lanes{} : e * power;
}

// tanh x = (1 - e^-2|x|) / (1 + e^-2|x|), and near 0, where this cancels, an odd polynomial.
SARM_INLINE void tanh_lanes(const Lanes& x, Lanes* out) {
  const Lanes size = x < 0.0f ? -x : x;
  Lanes e;
  exp_lanes(size * -2.0f, &e);
  const Lanes far = (1.0f - e) / (1.0f + e);
  const Lanes square = x * x;
  Lanes near = square * 2.18694885e-2f - 5.39682540e-2f;
  near = near * square + 1.33333333e-1f;
  near = near * square - 3.33333333e-1f;
  near = near * square * x + x;
  *out = size < 0.25f ? near : (x < 0.0f ? -far : far);
}

}  // namespace sarm::cpu
