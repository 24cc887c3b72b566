#include "cpu/topk_screen.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <type_traits>

#include "cpu/lanes.h"
#include "cpu/topk_key.h"

namespace sarm::cpu {
namespace {

constexpr int64_t kBlock = 32;  // entries tested at once
// Candidates gathered at least between two selections. With a slack of K the latents seen double
// from one selection to the next; a larger slack selects less often, but lets more pass.
constexpr int64_t kSlack = 64;
constexpr int64_t kAhead = 4;  // rows whose buffers are fetched in advance
constexpr int64_t kMaxGroups = 1024;
constexpr int64_t kSample = 16;  // one latent of so many
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kUnit = 0x1p-24f;  // half an ulp of 1

// Rounding of the sums x.w + b on both sides, generously.
constexpr float kRelative = 0x1p-21f;

// What rounding the tile itself to bf16 may have taken: half an ulp, 2^-8 of the product (not of
// product + bias, which may cancel).
SARM_INLINE float rounded_off(float) { return 0.0f; }
SARM_INLINE float rounded_off(bf16 v) {
  const float size = to_float(bf16{static_cast<uint16_t>(v.bits & 0x7FFFu)}) * 0x1.01p-8f;
  return size < std::numeric_limits<float>::max() ? size : 0.0f;
}

// Of pre = tile + bias: what it may be off by. |pre| stays finite, so that a latent whose bias is
// -inf stays at -inf.
SARM_INLINE float slack_of(float pre, float error) {
  float size = pre < 0.0f ? -pre : pre;
  size = size < std::numeric_limits<float>::max() ? size : std::numeric_limits<float>::max();
  return error + kRelative * size;
}

// The smallest pre whose `high` can reach the bound, a little less: pre + kRelative |pre| is
// monotone in pre. One comparison a latent, where low and high cost five operations.
SARM_INLINE float threshold(float bound, float error) {
  const float y = bound - error;
  const float pre = y >= 0.0f ? y / (1.0f + kRelative) : y / (1.0f - kRelative);
  // -inf never passes: a latent switched off by its bias is wanted only where fewer than K are on.
  if (!(pre > -kInf)) return std::numeric_limits<float>::lowest();
  return pre < kInf ? pre - std::fabs(pre) * 0x1p-20f : pre;
}

// A candidate and the row of x that it belongs to.
struct Scored {
  Candidate* candidate;
  int64_t row;
};

struct ByLow {
  bool operator()(const Candidate& a, const Candidate& b) const { return a.low > b.low; }
};

// Leaves what may still be among the K best and returns how many. No value is NaN.
inline int64_t keep_possible(Candidate* c, int64_t count, int64_t K, float* bound) {
  std::nth_element(c, c + (K - 1), c + count, ByLow());
  const float kth = std::max(*bound, c[K - 1].low);
  *bound = kth;
  return std::partition(c, c + count, [kth](const Candidate& e) { return e.high >= kth; }) - c;
}

void make_room(ScreenRow* row, Candidate* c, int64_t K, int64_t capacity) {
  const int64_t left = keep_possible(c, row->count, K, &row->bound);
  // With less than half of the least slack free, selections would follow each other too closely.
  row->undecided = left > capacity - kSlack / 2;
  row->count = static_cast<int32_t>(row->undecided ? 0 : left);
}

// A lower bound of the K-th largest value before anything is selected: the K-th largest of the
// maxima of interleaved groups. Members of a subset, so the bound is certain; with four groups per
// wanted value it also is tight (about 1.2 K entries pass it).
template <class S>
SARM_INLINE float bound_of_maxima(const S* tile, const float* bias, float error, int64_t C,
                                  int64_t K) {
  const int64_t groups = std::min({(4 * K + 63) / 64 * 64, C / 64 * 64, kMaxGroups});
  if (groups < K) return -kInf;
  float maxima[kMaxGroups];
  for (int64_t g = 0; g < groups; ++g) maxima[g] = -kInf;
  for (int64_t i = 0; i < C; i += groups) {
    const int64_t width = std::min(groups, C - i);
    for (int64_t g = 0; g < width; ++g) {
      const float pre = to_float(tile[i + g]) - rounded_off(tile[i + g]) + bias[i + g];
      maxima[g] = pre > maxima[g] ? pre : maxima[g];
    }
  }
  std::nth_element(maxima, maxima + (K - 1), maxima + groups, std::greater<float>());
  return maxima[K - 1] - slack_of(maxima[K - 1], error);
}

template <class S>
struct ScreenTile {
  SARM_INLINE static void run(const S* tile, const float* bias, const float* error, ScreenRow* rows,
                              Candidate* candidates, int64_t R, int64_t C, int64_t latent,
                              int64_t K, int64_t L) {
    const int64_t capacity = screen_capacity(K, L), stride = screen_stride(K, L);
    float worst = 0.0f;
    for (int64_t i = 0; i < C; ++i) {
      worst = error[i] > worst ? error[i] : worst;
      if (error[i] != error[i] || bias[i] != bias[i]) worst = kInf;
    }
    for (int64_t r = 0; r < R; ++r) {
      ScreenRow* row = rows + r;
      if (r + kAhead < R) {
        __builtin_prefetch(candidates + (r + kAhead) * stride + rows[r + kAhead].count, 1);
      }
      const float most = row->norm * worst;
      // NaN, or sums that may overflow: the error is more than 2^-18 of ||x|| ||w||.
      row->undecided |= !(most < 1e32f);
      if (row->undecided) continue;
      const S* pres = tile + r * C;
      Candidate* mine = candidates + r * stride;
      if (row->count == 0 && row->bound == -kInf) {
        row->bound = bound_of_maxima(pres, bias, most, C, K);
      }
      float least = threshold(row->bound, most);
      for (int64_t i = 0; i < C; i += kBlock) {
        const int64_t width = std::min(kBlock, C - i);
        uint32_t passing = 0;  // a bit for each; "not <" lets NaN pass
        if (width == kBlock) {
          for (int64_t t = 0; t < kBlock; ++t) {
            passing |= static_cast<uint32_t>(!(
                           to_float(pres[i + t]) + rounded_off(pres[i + t]) + bias[i + t] < least))
                       << t;
          }
        } else {
          for (int64_t t = 0; t < width; ++t) {
            passing |= static_cast<uint32_t>(!(
                           to_float(pres[i + t]) + rounded_off(pres[i + t]) + bias[i + t] < least))
                       << t;
          }
        }
        for (; passing != 0; passing &= passing - 1) {
          const int64_t l = i + __builtin_ctz(passing);
          const float pre = to_float(pres[l]) + bias[l];
          const float slack = slack_of(pre, row->norm * error[l] + rounded_off(pres[l]));
          row->undecided |= pre != pre;
          mine[row->count++] = {pre - slack, pre + slack, static_cast<uint32_t>(latent + l)};
        }
        if (row->undecided) break;
        if (row->count >= capacity && capacity < L) {
          make_room(row, mine, K, capacity);
          if (row->undecided) break;
          least = threshold(row->bound, most);
        }
      }
    }
  }
};

// sqrt(sum of squares), rounded up, in lanes.
template <class T>
SARM_INLINE float norm_and_widen(const T* v, int64_t D, float* wide) {
  Lanes sum[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= D; i += 2 * kLanes) {
    for (int64_t u = 0; u < 2; ++u) {
      Lanes a;
      load_lanes(v + i + u * kLanes, &a);
      if (wide != nullptr) std::memcpy(wide + i + u * kLanes, &a, sizeof(a));
      sum[u] += a * a;
    }
  }
  const Lanes both = sum[0] + sum[1];
  float total = 0.0f;
  for (int64_t t = 0; t < kLanes; ++t) total += both[t];
  for (; i < D; ++i) {
    const float a = to_float(v[i]);
    if (wide != nullptr) wide[i] = a;
    total += a * a;
  }
  return std::sqrt(total) * 1.001f;
}

// |fl(x.w) - x.w| <= D u |x|.|w| <= D u ||x|| ||w|| for any order of summation, to first order in
// u = 2^-24: for the tile's sum, and less for the exact one, whose chains are 64 times shorter.
SARM_INLINE float error_factor(int64_t D) { return 1.05f * static_cast<float>(D + 64) * kUnit; }

template <class T>
struct PrepareLatents {
  SARM_INLINE static void run(const T* w, int64_t C, int64_t D, float* error, float* wide) {
    for (int64_t l = 0; l < C; ++l) {
      float* to = wide == nullptr ? nullptr : wide + l * D;
      error[l] = error_factor(D) * norm_and_widen(w + l * D, D, to);
    }
  }
};

template <class T>
struct SampleLatents {
  SARM_INLINE static void run(const T* w, int64_t C, int64_t D, float* error) {
    float longest = 0.0f;
    for (int64_t l = 0; l < C; l += kSample) {
      const float norm = norm_and_widen(w + l * D, D, static_cast<float*>(nullptr));
      longest = !(norm <= longest) ? norm : longest;  // NaN stays
    }
    for (int64_t l = 0; l < C; ++l) error[l] = 2.0f * error_factor(D) * longest;
  }
};

template <class T>
struct PrepareRows {
  SARM_INLINE static void run(const T* x, int64_t R, int64_t D, ScreenRow* rows, float* wide) {
    for (int64_t r = 0; r < R; ++r) {
      float* to = wide == nullptr ? nullptr : wide + r * D;
      rows[r] = {-kInf, norm_and_widen(x + r * D, D, to), 0, false};
    }
  }
};

template <class T>
struct Rescore {
  // order: candidates by latent, those of latent `begin + l` at [offset[l], offset[l + 1]).
  SARM_INLINE static void run(const Scored* order, const int32_t* offset, const float* x,
                              const T* w, const float* bias, int64_t begin, int64_t latents,
                              int64_t D) {
    for (int64_t l = 0; l < latents; ++l) {
      const T* row = w + (begin + l) * D;
      int64_t e = offset[l];
      for (; e + 4 <= offset[l + 1]; e += 4) {
        const float* xs[4];
        float out[4];
        for (int64_t u = 0; u < 4; ++u) xs[u] = x + order[e + u].row * D;
        dot_rows<4>(xs, row, D, out);
        for (int64_t u = 0; u < 4; ++u) order[e + u].candidate->low = out[u] + bias[begin + l];
      }
      for (; e < offset[l + 1]; ++e) {
        order[e].candidate->low = dot(x + order[e].row * D, row, D) + bias[begin + l];
      }
    }
  }
};

}  // namespace

int64_t screen_capacity(int64_t K, int64_t L) { return std::min(L, K + std::max(K, kSlack)); }

int64_t screen_stride(int64_t K, int64_t L) { return screen_capacity(K, L) + kBlock; }

template <class T>
void prepare_latents(const T* w, int64_t C, int64_t D, float* error, float* wide) {
  run_widest<PrepareLatents<T>>(w, C, D, error, wide);
}

template <class T>
void sample_latents(const T* w, int64_t C, int64_t D, float* error) {
  run_widest<SampleLatents<T>>(w, C, D, error);
}

template <class T>
void prepare_rows(const T* x, int64_t R, int64_t D, ScreenRow* rows, float* wide) {
  run_widest<PrepareRows<T>>(x, R, D, rows, wide);
}

template <class S>
void screen_tile(const S* tile, const float* bias, const float* error, ScreenRow* rows,
                 Candidate* candidates, int64_t R, int64_t C, int64_t latent, int64_t K,
                 int64_t L) {
  run_widest<ScreenTile<S>>(tile, bias, error, rows, candidates, R, C, latent, K, L);
}

void tighten_row(ScreenRow* row, Candidate* candidates, int64_t splits, int64_t apart, int64_t K,
                 int64_t L, std::vector<float>* lows) {
  const int64_t stride = screen_stride(K, L);
  lows->clear();
  for (int64_t s = 0; s < splits; ++s) {
    const Candidate* c = candidates + s * apart * stride;
    for (int64_t i = 0; i < row[s * apart].count; ++i) lows->push_back(c[i].low);
  }
  if (static_cast<int64_t>(lows->size()) < K) {
    for (int64_t s = 0; s < splits; ++s) row[s * apart].undecided = true;
    return;
  }
  const auto kth = lows->begin() + (K - 1);
  std::nth_element(lows->begin(), kth, lows->end(), std::greater<float>());
  const float bound = *kth;
  for (int64_t s = 0; s < splits; ++s) {
    Candidate* c = candidates + s * apart * stride;
    ScreenRow* mine = row + s * apart;
    const auto possible = [bound](const Candidate& e) { return e.high >= bound; };
    mine->count = static_cast<int32_t>(std::partition(c, c + mine->count, possible) - c);
  }
}

template <class T>
void rescore(const ScreenRow* rows, Candidate* candidates, int64_t R, const float* x, const T* w,
             const float* bias, int64_t begin, int64_t end, int64_t K, int64_t D, int64_t L) {
  const int64_t latents = end - begin, stride = screen_stride(K, L);
  // A counting sort: offset[l + 1] counts latent l, becomes its first entry, ends as its last + 1.
  std::vector<int32_t> offset(latents + 2, 0);
  for (int64_t r = 0; r < R; ++r) {
    if (rows[r].undecided) continue;
    for (int64_t i = 0; i < rows[r].count; ++i) {
      ++offset[candidates[r * stride + i].latent - begin + 2];
    }
  }
  for (int64_t l = 0; l < latents; ++l) offset[l + 2] += offset[l + 1];
  std::vector<Scored> order(offset[latents + 1]);
  for (int64_t r = 0; r < R; ++r) {
    if (rows[r].undecided) continue;
    for (int64_t i = 0; i < rows[r].count; ++i) {
      Candidate* c = candidates + r * stride + i;
      order[offset[c->latent - begin + 1]++] = {c, r};
    }
  }
  run_widest<Rescore<T>>(order.data(), offset.data(), x, w, bias, begin, latents, D);
}

template void screen_tile(const float*, const float*, const float*, ScreenRow*, Candidate*, int64_t,
                          int64_t, int64_t, int64_t, int64_t);
template void screen_tile(const bf16*, const float*, const float*, ScreenRow*, Candidate*, int64_t,
                          int64_t, int64_t, int64_t, int64_t);

#define SARM_INSTANTIATE(T)                                                            \
  template void prepare_latents(const T*, int64_t, int64_t, float*, float*);           \
  template void sample_latents(const T*, int64_t, int64_t, float*);                    \
  template void prepare_rows(const T*, int64_t, int64_t, ScreenRow*, float*);          \
  template void rescore(const ScreenRow*, Candidate*, int64_t, const float*, const T*, \
                        const float*, int64_t, int64_t, int64_t, int64_t, int64_t);
SARM_INSTANTIATE(float)
SARM_INSTANTIATE(bf16)
SARM_INSTANTIATE(fp16)
#undef SARM_INSTANTIATE

}  // namespace sarm::cpu
