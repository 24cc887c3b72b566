// One integer that orders (value, index) as the contract of topk_encode does, so that selection
// needs no special case: the value's order in the high half, the complement of the index in the
// low half. A larger key is a better entry: larger value, then lower index; NaN of either sign
// above everything; -0 and +0 equal. Torch-free.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>

#include "common/simd.h"

namespace sarm::cpu {

SARM_INLINE uint64_t make_key(float v, uint32_t index) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof(bits));
  if (v == 0.0f) bits = 0;
  uint32_t order = bits ^ ((bits >> 31) != 0 ? 0xFFFFFFFFu : 0x80000000u);
  if (v != v) order = 0xFFFFFFFFu;
  return (static_cast<uint64_t>(order) << 32) | (0xFFFFFFFFu - index);
}

SARM_INLINE uint32_t key_index(uint64_t key) { return 0xFFFFFFFFu - static_cast<uint32_t>(key); }

SARM_INLINE float key_value(uint64_t key) {
  const uint32_t order = static_cast<uint32_t>(key >> 32);
  const uint32_t bits = (order >> 31) != 0 ? order ^ 0x80000000u : ~order;
  float v;
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}

// Leaves the K best of `count` keys in front and returns the worst of them. count >= K >= 1.
inline uint64_t keep_best(uint64_t* keys, int64_t count, int64_t K) {
  std::nth_element(keys, keys + (K - 1), keys + count, std::greater<uint64_t>());
  return keys[K - 1];
}

// The K best of `count` keys as sorted values and indices.
inline void write_best(uint64_t* keys, int64_t count, int64_t K, float* vals, int64_t* idx) {
  keep_best(keys, count, K);
  std::sort(keys, keys + K, std::greater<uint64_t>());
  for (int64_t j = 0; j < K; ++j) {
    vals[j] = key_value(keys[j]);
    idx[j] = key_index(keys[j]);
  }
}

}  // namespace sarm::cpu
