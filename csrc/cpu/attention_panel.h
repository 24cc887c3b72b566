// Products of a panel: 16 V rows (queries of one key head), a row to a lane. See attention.cpp.
// Torch-free.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/lanes.h"

namespace sarm::cpu {

constexpr int64_t kUnroll = 8;  // keys, or columns of v, at a time
// Of a key that is not seen: below every score, and finite, so that its difference to itself is 0.
// A query that has seen no key yet gathers weights of 1, which its first key shrinks by 0.
constexpr float kNoScore = -1e30f;

// Registers of rows in a panel: 3 * 8 accumulators fit 32 registers, 1 * 8 sixteen half-registers.
inline int64_t panel_vectors() { return simd_level() == Simd::avx512 ? 3 : 1; }

SARM_INLINE void store_lanes(const Lanes& v, float* to) { std::memcpy(to, &v, sizeof(v)); }

template <int V>
struct Panel {
  static constexpr int64_t W = V * kLanes;  // rows

  // s (8, W) = k (8, D) @ q (D, W), each element one chain of sums over D.
  static SARM_INLINE void scores(const float* k, const float* q, int64_t D, float* s) {
    Lanes sum[kUnroll][V] = {};
    for (int64_t d = 0; d < D; ++d) {
      Lanes row[V];
      for (int v = 0; v < V; ++v) load_lanes(q + d * W + v * kLanes, &row[v]);
      for (int64_t i = 0; i < kUnroll; ++i) {
        for (int v = 0; v < V; ++v) sum[i][v] += row[v] * k[i * D + d];
      }
    }
    for (int64_t i = 0; i < kUnroll; ++i) {
      for (int v = 0; v < V; ++v) store_lanes(sum[i][v], s + i * W + v * kLanes);
    }
  }

  // o (U, W) = o * shrink + v (keys, U).T @ p (keys, W), keys in order.
  template <int U>
  static SARM_INLINE void mix(const float* v, const float* p, int64_t keys, int64_t D,
                              const Lanes shrink[V], float* o) {
    Lanes sum[U][V];
    for (int i = 0; i < U; ++i) {
      for (int c = 0; c < V; ++c) {
        load_lanes(o + i * W + c * kLanes, &sum[i][c]);
        sum[i][c] *= shrink[c];
      }
    }
    for (int64_t key = 0; key < keys; ++key) {
      Lanes row[V];
      for (int c = 0; c < V; ++c) load_lanes(p + key * W + c * kLanes, &row[c]);
      for (int i = 0; i < U; ++i) {
        for (int c = 0; c < V; ++c) sum[i][c] += row[c] * v[key * D + i];
      }
    }
    for (int i = 0; i < U; ++i) {
      for (int c = 0; c < V; ++c) store_lanes(sum[i][c], o + i * W + c * kLanes);
    }
  }
};

}  // namespace sarm::cpu
