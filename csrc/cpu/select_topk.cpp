// Exact top-k of rows by a running threshold. The K-th largest value seen so far is a lower
// bound of the final one, so an entry that does not beat it is dropped for good, and the scan is
// one vector compare. Few entries reach the candidate buffer; when it fills, the K best are kept
// and the bound rises.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "cpu/kernels.h"

namespace sarm::cpu {
namespace {

constexpr int64_t kBlock = 32;   // entries tested at once
constexpr int64_t kSlack = 256;  // candidates gathered between two selections
constexpr int64_t kMinRow = 16;  // shorter rows (in units of K) do without a first bound

SARM_INLINE int64_t candidates(int64_t K, int64_t L) { return std::min(K + kSlack, L); }

// Four groups per wanted value, in whole vectors.
SARM_INLINE int64_t groups(int64_t K) { return (4 * K + 63) / 64 * 64; }

// One integer that orders candidates as the contract does, so that selection needs no special
// case: the value's order in the high half, the complement of the index in the low half.
SARM_INLINE uint64_t make_key(float v, int64_t index) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof(bits));
  if (v == 0.0f) bits = 0;  // -0 and +0 are equal
  uint32_t order = bits ^ ((bits >> 31) != 0 ? 0xFFFFFFFFu : 0x80000000u);
  if (v != v) order = 0xFFFFFFFFu;  // NaN of either sign ranks highest
  return (static_cast<uint64_t>(order) << 32) | (0xFFFFFFFFu - static_cast<uint32_t>(index));
}

SARM_INLINE int64_t key_index(uint64_t key) {
  return static_cast<int64_t>(0xFFFFFFFFu - static_cast<uint32_t>(key));
}

struct Descending {
  bool operator()(uint64_t a, uint64_t b) const { return a > b; }
};

// Leaves the K best keys in front and returns the value of the worst of them.
inline float keep_best(uint64_t* keys, int64_t count, int64_t K, const float* row) {
  if (count > K) std::nth_element(keys, keys + (K - 1), keys + count, Descending());
  return row[key_index(*std::min_element(keys, keys + K))];
}

// A lower bound of the K-th largest value before anything is selected: the K-th largest of the
// maxima of `groups` interleaved groups. Members of a subset, so the bound is certain; with four
// groups per wanted value it also is tight (about 1.2 K entries pass it), and it costs one vector
// maximum per entry. NaN is ignored: v > m is false.
SARM_INLINE float bound_of_maxima(const float* row, float* maxima, int64_t groups, int64_t K,
                                  int64_t L) {
  for (int64_t g = 0; g < groups; ++g) maxima[g] = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < L; i += groups) {
    const int64_t width = std::min(groups, L - i);
    for (int64_t g = 0; g < width; ++g) {
      maxima[g] = row[i + g] > maxima[g] ? row[i + g] : maxima[g];
    }
  }
  std::nth_element(maxima, maxima + (K - 1), maxima + groups, std::greater<float>());
  return maxima[K - 1];
}

struct SelectTopk {
  SARM_INLINE static void run(const float* pre, float* vals, int64_t* idx, uint64_t* keys,
                              int64_t begin, int64_t end, int64_t K, int64_t L) {
    const int64_t capacity = candidates(K, L);
    float* maxima = reinterpret_cast<float*>(keys + capacity + kBlock);
    for (int64_t n = begin; n < end; ++n) {
      const float* row = pre + n * L;
      int64_t i = 0, count = 0;
      // Invariant: an entry v <= bound from here on is not among the K best.
      float bound = -std::numeric_limits<float>::infinity();
      if (L >= kMinRow * K) bound = bound_of_maxima(row, maxima, groups(K), K, L);
      if (bound > -std::numeric_limits<float>::infinity()) {
        // Entries equal to this bound may still be needed.
        bound = std::nextafter(bound, -std::numeric_limits<float>::infinity());
      } else {
        for (; i < capacity; ++i) keys[i] = make_key(row[i], i);
        bound = keep_best(keys, capacity, K, row);
        count = K;
      }
      // "not (v <= bound)" also lets NaN pass. A value equal to the K-th best of the entries
      // before it loses its tie, so it is rightly dropped. Nothing beats a NaN bound.
      for (; i < L && bound == bound; i += kBlock) {
        const int64_t width = std::min(kBlock, L - i);
        if (width == kBlock) {
          int any = 0;
          for (int64_t t = 0; t < kBlock; ++t) any |= !(row[i + t] <= bound);
          if (any == 0) continue;
        }
        for (int64_t t = 0; t < width; ++t) {  // branch-free append; kBlock spare slots
          keys[count] = make_key(row[i + t], i + t);
          count += !(row[i + t] <= bound);
        }
        if (count >= capacity) {
          bound = keep_best(keys, count, K, row);
          count = K;
        }
      }
      keep_best(keys, count, K, row);
      std::sort(keys, keys + K, Descending());
      for (int64_t j = 0; j < K; ++j) {
        idx[n * K + j] = key_index(keys[j]);
        vals[n * K + j] = row[idx[n * K + j]];
      }
    }
  }
};

}  // namespace

int64_t select_topk_scratch(int64_t K, int64_t L) {
  return candidates(K, L) + kBlock + groups(K) / 2;
}

void select_topk(const float* pre, float* vals, int64_t* idx, uint64_t* scratch, int64_t begin,
                 int64_t end, int64_t K, int64_t L) {
  run_widest<SelectTopk>(pre, vals, idx, scratch, begin, end, K, L);
}

}  // namespace sarm::cpu
