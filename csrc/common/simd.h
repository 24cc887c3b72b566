// One binary for every x86-64: a kernel body is written once in portable C++ and compiled for
// AVX-512, AVX2 and the baseline; the widest the CPU has is picked at run time. On other CPUs
// only the baseline exists. Torch-free.
//
// target_clones would be shorter, but its "arch=" names match vendors and not features (an AMD
// CPU would get the baseline), and it needs ifunc.
#pragma once

#include <cstdlib>
#include <cstring>

#define SARM_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
#define SARM_X86_64 1
#define SARM_TARGET_AVX2 __attribute__((target("avx2,fma")))
#if defined(__clang__)
#define SARM_TARGET_AVX512 __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")))
#else
// Without the width preference GCC stays at 256 bits even where 512 are allowed.
#define SARM_TARGET_AVX512 \
  __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#endif
#endif

namespace sarm {

enum class Simd { portable, avx2, avx512 };

// SARM_SIMD=portable|avx2 lowers the choice (for tests and bug reports); it never raises it.
inline Simd detect_simd() {
  Simd level = Simd::portable;
#ifdef SARM_X86_64
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) level = Simd::avx2;
  if (level == Simd::avx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    level = Simd::avx512;
  }
#endif
  const char* cap = std::getenv("SARM_SIMD");
  if (cap != nullptr && std::strcmp(cap, "portable") == 0) level = Simd::portable;
  if (cap != nullptr && std::strcmp(cap, "avx2") == 0 && level == Simd::avx512) level = Simd::avx2;
  return level;
}

inline Simd simd_level() {
  static const Simd level = detect_simd();
  return level;
}

#ifdef SARM_X86_64
template <class Body, class... Args>
SARM_TARGET_AVX512 void run_avx512(Args... args) {
  Body::run(args...);
}

template <class Body, class... Args>
SARM_TARGET_AVX2 void run_avx2(Args... args) {
  Body::run(args...);
}
#endif

// Body::run must be static and SARM_INLINE, call only SARM_INLINE helpers in its hot loops, and
// hold no lambda: a lambda is a function of its own and would be compiled for the baseline.
template <class Body, class... Args>
void run_widest(Args... args) {
#ifdef SARM_X86_64
  switch (simd_level()) {
    case Simd::avx512:
      return run_avx512<Body>(args...);
    case Simd::avx2:
      return run_avx2<Body>(args...);
    case Simd::portable:
      break;
  }
#endif
  Body::run(args...);
}

}  // namespace sarm
