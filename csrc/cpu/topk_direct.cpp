#include "cpu/topk_direct.h"

#include <algorithm>

#include "cpu/lanes.h"
#include "cpu/topk_key.h"

namespace sarm::cpu {
namespace {

constexpr int64_t kSlack = 256;   // keys gathered at least between two selections
constexpr int64_t kTogether = 4;  // rows in registers: 16 sums of 16 lanes

inline int64_t capacity_of(int64_t K) { return K + std::max(K, kSlack); }

template <class T>
struct DirectRows {
  SARM_INLINE static void run(const float* const* x, int64_t R, const T* w, const float* bias,
                              uint64_t* keys, int64_t* count, int64_t begin, int64_t end, int64_t K,
                              int64_t D) {
    const int64_t capacity = capacity_of(K);
    uint64_t bound[kDirectRows];
    for (int64_t r = 0; r < R; ++r) {
      bound[r] = 0;
      count[r] = 0;
    }
    for (int64_t l = begin; l < end; ++l) {
      float value[kDirectRows];
      int64_t r = 0;
      for (; r + kTogether <= R; r += kTogether)
        dot_rows<kTogether>(x + r, w + l * D, D, value + r);
      for (; r < R; ++r) dot_rows<1>(x + r, w + l * D, D, value + r);
      for (r = 0; r < R; ++r) {
        const uint64_t key = make_key(value[r] + bias[l], static_cast<uint32_t>(l));
        if (key < bound[r]) continue;
        uint64_t* mine = keys + r * capacity;
        mine[count[r]++] = key;
        if (count[r] == capacity) {
          bound[r] = keep_best(mine, capacity, K);
          count[r] = K;
        }
      }
    }
    for (int64_t r = 0; r < R; ++r) {
      if (count[r] > K) keep_best(keys + r * capacity, count[r], K);
      count[r] = std::min(count[r], K);
    }
  }
};

}  // namespace

int64_t direct_stride(int64_t K) { return capacity_of(K); }

template <class T>
void direct_rows(const float* const* x, int64_t R, const T* w, const float* bias, uint64_t* keys,
                 int64_t* count, int64_t begin, int64_t end, int64_t K, int64_t D) {
  run_widest<DirectRows<T>>(x, R, w, bias, keys, count, begin, end, K, D);
}

#define SARM_INSTANTIATE(T)                                                                  \
  template void direct_rows(const float* const*, int64_t, const T*, const float*, uint64_t*, \
                            int64_t*, int64_t, int64_t, int64_t, int64_t);
SARM_INSTANTIATE(float)
SARM_INSTANTIATE(bf16)
SARM_INSTANTIATE(fp16)
#undef SARM_INSTANTIATE

}  // namespace sarm::cpu
