// The gradient of attention: a panel of rows at a time against all the keys it sees. Its scores are
// computed again and stay in L2; nothing of them is kept from the forward pass.
//
//   S = scale q k^T     P = softmax(S)       out = P v         delta = rowsum(d_out * out)
//   d_v = P^T d_out     d_P = d_out v^T      d_S = P * (d_P - delta)
//   d_q = scale d_S k   d_k = scale d_S^T q
#include <algorithm>

#include "cpu/attention.h"
#include "cpu/attention_panel.h"
#include "cpu/exp.h"
#include "cpu/lanes.h"

namespace sarm::cpu {
namespace {

constexpr int64_t kTileKeys = 64;

int64_t padded(int64_t keys) { return (keys + kTileKeys - 1) / kTileKeys * kTileKeys; }

template <int V>
struct BackwardRun : Panel<V> {
  using Panel<V>::W;
  using Panel<V>::scores;

  // out (K, C * 16 of D columns) += a (K, W) @ b (W, D).
  template <int K, int C>
  static SARM_INLINE void outer(const float* a, const float* b, int64_t D, float* out) {
    Lanes sum[K][C];
    for (int i = 0; i < K; ++i) {
      for (int c = 0; c < C; ++c) load_lanes(out + i * D + c * kLanes, &sum[i][c]);
    }
    for (int64_t r = 0; r < W; ++r) {
      Lanes row[C];
      for (int c = 0; c < C; ++c) load_lanes(b + r * D + c * kLanes, &row[c]);
      for (int i = 0; i < K; ++i) {
        for (int c = 0; c < C; ++c) sum[i][c] += row[c] * a[i * W + r];
      }
    }
    for (int i = 0; i < K; ++i) {
      for (int c = 0; c < C; ++c) store_lanes(sum[i][c], out + i * D + c * kLanes);
    }
  }

  template <int K>
  static SARM_INLINE void outer_rows(const float* a, const float* b, int64_t D, float* out) {
    constexpr int C = V == 3 ? 4 : 1;  // 6 * 4 accumulators, or 4 double ones
    int64_t d = 0;
    for (; d + C * kLanes <= D; d += C * kLanes) outer<K, C>(a, b + d, D, out + d);
    for (; d + kLanes <= D; d += kLanes) outer<K, 1>(a, b + d, D, out + d);
    for (; d < D; ++d) {
      for (int i = 0; i < K; ++i) {
        for (int64_t r = 0; r < W; ++r) out[i * D + d] += a[i * W + r] * b[r * D + d];
      }
    }
  }

  static SARM_INLINE void outer_keys(const float* a, const float* b, int64_t keys, int64_t D,
                                     float* out) {
    constexpr int K = V == 3 ? 6 : 4;
    int64_t i = 0;
    for (; i + K <= keys; i += K) outer_rows<K>(a + i * W, b, D, out + i * D);
    for (; i < keys; ++i) outer_rows<1>(a + i * W, b, D, out + i * D);
  }

  static SARM_INLINE void run(const AttentionGradient& p, const AttentionRun& run, int64_t g,
                              float* d_k, float* d_v, float* scratch) {
    const Attention<float>& f = p.forward;
    const int64_t D = f.D, R = f.H / f.G, total = run.count * R;
    const int64_t keys = run.position + run.count, room = padded(keys);
    float* k = scratch;
    float* v = k + room * D;
    float* s = v + room * D;
    float* bent = s + room * W;  // of softcap: the tanh
    float* ds = bent + (f.softcap > 0.0f ? room * W : 0);
    float* q = ds + kTileKeys * W;
    float* qt = q + W * D;
    float* d_out = qt + W * D;
    float* doutt = d_out + W * D;
    float* dqt = doutt + W * D;
    float* deltas = dqt + W * D;
    int32_t* position = reinterpret_cast<int32_t*>(deltas + W);
    const AttentionRange* range = f.ranges + run.range;
    int64_t passed = 0;
    for (int64_t i = 0; i < keys; ++i) {
      while (i >= passed + range->count) passed += range++->count;
      const int64_t at = ((range->first + i - passed) * f.G + g) * D;
      std::copy(f.k + at, f.k + at + D, k + i * D);
      std::copy(f.v + at, f.v + at + D, v + i * D);
    }
    std::fill(k + keys * D, k + room * D, 0.0f);
    std::fill(v + keys * D, v + room * D, 0.0f);
    const int32_t window = static_cast<int32_t>(f.window > 0 ? f.window : int64_t{1} << 30);
    for (int64_t first = 0; first < total; first += W) {
      for (int64_t r = 0; r < W; ++r) {
        const int64_t row = std::min(first + r, total - 1);  // a panel's rest: a row without weight
        const float weight = first + r < total ? 1.0f : 0.0f;
        const int64_t token = row / R, at = ((run.first + token) * f.H + g * R + row % R) * D;
        float delta = 0.0f;
        for (int64_t d = 0; d < D; ++d) {
          q[r * D + d] = qt[d * W + r] = f.q[at + d] * f.scale;
          d_out[r * D + d] = doutt[d * W + r] = p.d_out[at + d] * weight;
          delta += p.d_out[at + d] * weight * f.out[at + d];
        }
        deltas[r] = delta;
        position[r] = static_cast<int32_t>(run.position + token);
      }
      const int64_t least = position[0], high = position[W - 1] + 1;
      const int64_t low = f.window > 0 ? std::max<int64_t>(0, least - f.window + 1) : int64_t{0};
      const int64_t start = low / kUnroll * kUnroll;
      Lanes top[V], sum[V], delta[V], one[V];
      LaneInts at[V];
      for (int c = 0; c < V; ++c) {
        top[c] = Lanes{} + kNoScore;
        sum[c] = Lanes{};
        one[c] = Lanes{} + 1.0f;
        load_lanes(deltas + c * kLanes, &delta[c]);
        std::memcpy(&at[c], position + c * kLanes, sizeof(at[c]));
      }
      for (int64_t key = start; key < high; key += kUnroll) {
        scores(k + key * D, qt, D, s + key * W);
      }
      for (int64_t key = low; key < high; ++key) {
        for (int c = 0; c < V; ++c) {
          Lanes score;
          load_lanes(s + key * W + c * kLanes, &score);
          if (f.softcap > 0.0f) {
            Lanes ratio;
            tanh_lanes(score / f.softcap, &ratio);
            store_lanes(ratio, bent + key * W + c * kLanes);
            score = ratio * f.softcap;
          }
          if (key > least || f.window > 0) {
            const int32_t i = static_cast<int32_t>(key);
            score = (at[c] >= i) & (at[c] - window < i) ? score : Lanes{} + kNoScore;
          }
          store_lanes(score, s + key * W + c * kLanes);
          top[c] = score > top[c] ? score : top[c];
        }
      }
      for (int64_t key = low; key < high; ++key) {
        for (int c = 0; c < V; ++c) {
          Lanes score, weight;
          load_lanes(s + key * W + c * kLanes, &score);
          exp_lanes(score - top[c], &weight);
          store_lanes(weight, s + key * W + c * kLanes);
          sum[c] += weight;
        }
      }
      std::fill(dqt, dqt + W * D, 0.0f);
      for (int64_t tile = start; tile < high; tile += kTileKeys) {
        const int64_t from = std::max(tile, low), to = std::min(tile + kTileKeys, high);
        for (int64_t key = tile; key < to; key += kUnroll) {
          scores(v + key * D, doutt, D, ds + (key - tile) * W);
        }
        for (int64_t key = from; key < to; ++key) {
          for (int c = 0; c < V; ++c) {
            Lanes weight, slope;
            load_lanes(s + key * W + c * kLanes, &weight);
            load_lanes(ds + (key - tile) * W + c * kLanes, &slope);
            weight /= sum[c];
            slope = weight * (slope - delta[c]);
            if (f.softcap > 0.0f) {
              Lanes ratio;
              load_lanes(bent + key * W + c * kLanes, &ratio);
              slope *= 1.0f - ratio * ratio;
            }
            store_lanes(weight, s + key * W + c * kLanes);
            store_lanes(slope, ds + (key - tile) * W + c * kLanes);
          }
        }
        const float* slopes = ds + (from - tile) * W;
        int64_t d = 0;
        for (; d + kUnroll <= D; d += kUnroll) {
          Panel<V>::template mix<kUnroll>(k + from * D + d, slopes, to - from, D, one, dqt + d * W);
        }
        for (; d < D; ++d) {
          Panel<V>::template mix<1>(k + from * D + d, slopes, to - from, D, one, dqt + d * W);
        }
        outer_keys(s + from * W, d_out, to - from, D, d_v + from * D);
        outer_keys(slopes, q, to - from, D, d_k + from * D);
      }
      for (int64_t r = 0; r < std::min(W, total - first); ++r) {
        const int64_t row = first + r;
        float* to = p.d_q + ((run.first + row / R) * f.H + g * R + row % R) * D;
        for (int64_t d = 0; d < D; ++d) to[d] = dqt[d * W + r] * f.scale;
      }
    }
  }
};

}  // namespace

int64_t attention_backward_scratch(int64_t keys, int64_t D, bool softcap) {
  const int64_t W = panel_vectors() * kLanes, room = padded(keys);
  return room * (2 * D + W * (softcap ? 2 : 1)) + kTileKeys * W + W * (5 * D + 2);
}

void attend_backward(const AttentionGradient& problem, const AttentionRun& run, int64_t g,
                     float* d_k, float* d_v, float* scratch) {
  if (panel_vectors() == 3) {
    run_widest<BackwardRun<3>>(problem, run, g, d_k, d_v, scratch);
  } else {
    run_widest<BackwardRun<1>>(problem, run, g, d_k, d_v, scratch);
  }
}

}  // namespace sarm::cpu
