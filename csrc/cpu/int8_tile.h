// Micro-kernels of the int8 product: kTileRows rows of q times one packed panel of kPanel weights,
// in int32. Torch-free. A level knows how it wants its operands:
//
//   Vnni      (AVX-512 VNNI)  q as it is, four columns at a time (vpdpbusd). One factor must be
//                             unsigned: the weights are stored plus 128, and 128 * sum(q) is taken
//                             off again. Sums wrap around modulo 2^32, so only the end must fit.
//   Avx2      (AVX2)          q and weights as int16, two columns at a time (vpmaddwd); the faster
//                             vpmaddubsw saturates, it is not exact.
//   Portable                  int16, a column at a time, left to the compiler.
//
// Each has pack(w, width, D, panel): `width` <= kPanel rows of w (., D) in the level's own order,
// zeros for missing rows and for columns up to the next multiple of kStep; prepare(q, R, D, start):
// what the sums of R rows start from; tile<R>(q, D, panel, start, sums): sums (R, kPanel) = start +
// q @ panel, where D is a multiple of kStep.
#pragma once

#include <cstring>

#include "cpu/int8.h"

#ifdef SARM_X86_64
// GCC 12 takes the undefined lanes of its own intrinsics for a mistake (its bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#define SARM_TARGET_VNNI \
  __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#endif

namespace sarm::cpu {

constexpr int kTileRows = 6;  // x 4 registers of 16 columns: 24 sums, and 8 registers for operands

struct Portable {
  using Weight = int16_t;
  static constexpr int64_t kStep = 1;

  // panel[i][c] = w[c, i] for the `width` <= kPanel rows of w.
  static void pack(const int8_t* w, int64_t width, int64_t D, Weight* panel) {
    std::memset(panel, 0, D * kPanel * sizeof(Weight));
    for (int64_t c = 0; c < width; ++c) {
      for (int64_t i = 0; i < D; ++i) panel[i * kPanel + c] = w[c * D + i];
    }
  }

  static void prepare(const int8_t*, int64_t R, int64_t, int32_t* start) {
    std::memset(start, 0, R * sizeof(int32_t));
  }

  template <int R>
  static void tile(const int8_t* q, int64_t D, const Weight* panel, const int32_t* start,
                   int32_t* sums) {
    for (int r = 0; r < R; ++r) {
      int32_t* __restrict sum = sums + r * kPanel;
      for (int64_t c = 0; c < kPanel; ++c) sum[c] = start[r];
      for (int64_t i = 0; i < D; ++i) {
        const int32_t a = q[r * D + i];
        for (int64_t c = 0; c < kPanel; ++c) sum[c] += a * panel[i * kPanel + c];
      }
    }
  }
};

#ifdef SARM_X86_64

struct Avx2 : Portable {
  static constexpr int64_t kStep = 2;
  static constexpr int64_t kPart = 16;  // columns of a panel held in two registers a row

  // panel[part][i / 2][c][i % 2] = w[part * kPart + c, i]
  static void pack(const int8_t* w, int64_t width, int64_t D, Weight* panel) {
    const int64_t pairs = (D + 1) / 2;
    std::memset(panel, 0, pairs * 2 * kPanel * sizeof(Weight));
    for (int64_t c = 0; c < width; ++c) {
      Weight* to = panel + c / kPart * pairs * 2 * kPart + c % kPart * 2;
      for (int64_t i = 0; i < D; ++i) to[i / 2 * 2 * kPart + i % 2] = w[c * D + i];
    }
  }

  template <int R>
  SARM_TARGET_AVX2 static void tile(const int8_t* q, int64_t D, const Weight* panel,
                                    const int32_t* start, int32_t* sums) {
    const int64_t pairs = D / 2;
    for (int64_t part = 0; part < kPanel / kPart; ++part) {
      __m256i sum[R][2];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm256_set1_epi32(start[r]);
      for (int64_t g = 0; g < pairs; ++g) {
        const __m256i* from = reinterpret_cast<const __m256i*>(panel) + (part * pairs + g) * 2;
        const __m256i w0 = _mm256_loadu_si256(from), w1 = _mm256_loadu_si256(from + 1);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const int8_t* pair = q + r * D + 2 * g;
          const __m256i a = _mm256_set1_epi32((pair[0] & 0xFFFF) | pair[1] * 0x10000);
          sum[r][0] = _mm256_add_epi32(sum[r][0], _mm256_madd_epi16(a, w0));
          sum[r][1] = _mm256_add_epi32(sum[r][1], _mm256_madd_epi16(a, w1));
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        __m256i* to = reinterpret_cast<__m256i*>(sums + r * kPanel + part * kPart);
        _mm256_storeu_si256(to, sum[r][0]);
        _mm256_storeu_si256(to + 1, sum[r][1]);
      }
    }
  }
};

struct Vnni {
  using Weight = uint8_t;
  static constexpr int64_t kStep = 4;
  static constexpr int64_t kGroup = kPanel * kStep;  // bytes of four columns of a panel

  static bool supported() {
    return simd_level() == Simd::avx512 && __builtin_cpu_supports("avx512vnni");
  }

  // panel[i / 4][c][i % 4] = w[c, i] + 128, but 0 beyond D: what q holds there does not matter.
  SARM_TARGET_VNNI static void pack(const int8_t* w, int64_t width, int64_t D, Weight* panel) {
    const __m512i offset = _mm512_set1_epi8(static_cast<char>(0x80));
    for (int64_t c = 0; c < kPanel; c += 16) {
      for (int64_t i = 0; i < D; i += 64) {
        __m512i row[16];
#pragma GCC unroll 16
        for (int64_t r = 0; r < 16; ++r) {
          const __mmask64 real = c + r < width ? inside(D - i) : 0;  // the rest is not read
          const __m512i bytes = _mm512_maskz_loadu_epi8(real, w + (c + r) * D + i);
          row[r] = _mm512_maskz_mov_epi8(real, _mm512_xor_si512(bytes, offset));
        }
        transpose(row);
        const int64_t groups = (std::min<int64_t>(64, D - i) + 3) / 4;
        for (int64_t g = 0; g < groups; ++g) {
          _mm512_storeu_si512(panel + (i / 4 + g) * kGroup + c * kStep, row[g]);
        }
      }
    }
  }

  SARM_TARGET_VNNI static void prepare(const int8_t* q, int64_t R, int64_t D, int32_t* start) {
    const __m512i ones = _mm512_set1_epi8(1);
    for (int64_t r = 0; r < R; ++r) {
      __m512i sum = _mm512_setzero_si512();
      for (int64_t i = 0; i < D; i += 64) {
        const __m512i row = _mm512_maskz_loadu_epi8(inside(D - i), q + r * D + i);
        sum = _mm512_dpbusd_epi32(sum, ones, row);
      }
      start[r] = -128 * _mm512_reduce_add_epi32(sum);
    }
  }

  template <int R>
  SARM_TARGET_VNNI static void tile(const int8_t* q, int64_t D, const Weight* panel,
                                    const int32_t* start, int32_t* sums) {
    __m512i sum[R][4];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      sum[r][0] = sum[r][1] = sum[r][2] = sum[r][3] = _mm512_set1_epi32(start[r]);
    }
    for (int64_t i = 0; i < D; i += kStep) {
      const uint8_t* group = panel + i * kPanel;
      const __m512i w0 = _mm512_loadu_si512(group), w1 = _mm512_loadu_si512(group + 64);
      const __m512i w2 = _mm512_loadu_si512(group + 128), w3 = _mm512_loadu_si512(group + 192);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        int32_t four;
        std::memcpy(&four, q + r * D + i, sizeof(four));
        const __m512i a = _mm512_set1_epi32(four);
        sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], w0, a);
        sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], w1, a);
        sum[r][2] = _mm512_dpbusd_epi32(sum[r][2], w2, a);
        sum[r][3] = _mm512_dpbusd_epi32(sum[r][3], w3, a);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      _mm512_storeu_si512(sums + r * kPanel, sum[r][0]);
      _mm512_storeu_si512(sums + r * kPanel + 16, sum[r][1]);
      _mm512_storeu_si512(sums + r * kPanel + 32, sum[r][2]);
      _mm512_storeu_si512(sums + r * kPanel + 48, sum[r][3]);
    }
  }

 private:
  // The mask of the first `count` of 64 bytes.
  SARM_TARGET_VNNI static __mmask64 inside(int64_t count) {
    return count >= 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1;
  }

  // row[r] dword g  <->  row[g] dword r
  SARM_TARGET_VNNI SARM_INLINE static void transpose(__m512i (&row)[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      row[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
      row[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
      row[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
      row[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // 128-bit parts: a 4 x 4 transpose of them
      const __m512i a = _mm512_shuffle_i32x4(row[i], row[i + 4], 0x88);
      const __m512i b = _mm512_shuffle_i32x4(row[i], row[i + 4], 0xDD);
      const __m512i c = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0x88);
      const __m512i d = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0xDD);
      t[i] = _mm512_shuffle_i32x4(a, c, 0x88);
      t[i + 8] = _mm512_shuffle_i32x4(a, c, 0xDD);
      t[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
      t[i + 12] = _mm512_shuffle_i32x4(b, d, 0xDD);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) row[i] = t[i];
  }
};
#endif

}  // namespace sarm::cpu
