// Scores and sums are held transposed, S^T (keys, rows) and O^T (D, rows), sixteen rows to a
// register: softmax then works on whole registers with no shuffle, both products are outer
// products of a register and a broadcast number, and keys need no transposition. A panel of 48
// rows and 8 keys (or 8 columns of v) takes 24 of AVX-512's 32 registers as accumulators.
#include "cpu/attention.h"

#include <algorithm>

#include "cpu/attention_panel.h"
#include "cpu/exp.h"
#include "cpu/lanes.h"

namespace sarm::cpu {
namespace {

constexpr int64_t kTileKeys = 64;  // 64 keys and values of width 64 are 32 KiB: L1
constexpr int64_t kPanels = 4;     // of a block; more share a copied tile, fewer fit in L2
template <class T>
SARM_INLINE void copy_row(const T* from, int64_t D, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= D; i += kLanes) {
    Lanes lanes;
    load_lanes(from + i, &lanes);
    std::memcpy(to + i, &lanes, sizeof(lanes));
  }
  for (; i < D; ++i) to[i] = to_float(from[i]);
}

template <class T, int V>
struct AttendBlock : Panel<V> {
  using Panel<V>::W;
  using Panel<V>::scores;

  // One panel against the keys [low, high) of the tile at position `tile`.
  static SARM_INLINE void step(const Attention<T>& p, const float* k, const float* v, int64_t tile,
                               int64_t low, int64_t high, int64_t least, const float* q,
                               const int32_t* position, float* most, float* total, float* s,
                               float* o) {
    for (int64_t key = low / kUnroll * kUnroll; key < high; key += kUnroll) {
      scores(k + key * p.D, q, p.D, s + key * W);
    }
    Lanes top[V], sum[V], shrink[V];
    LaneInts at[V];
    for (int c = 0; c < V; ++c) {
      load_lanes(most + c * kLanes, &top[c]);
      load_lanes(total + c * kLanes, &sum[c]);
      std::memcpy(&at[c], position + c * kLanes, sizeof(at[c]));
      at[c] -= static_cast<int32_t>(tile);
    }
    const bool masked = high - 1 + tile > least || p.window > 0;
    const int32_t window = static_cast<int32_t>(p.window > 0 ? p.window : int64_t{1} << 30);
    for (int64_t key = low; key < high; ++key) {
      for (int c = 0; c < V; ++c) {
        Lanes score;
        load_lanes(s + key * W + c * kLanes, &score);
        if (p.softcap > 0.0f) {
          tanh_lanes(score / p.softcap, &score);
          score *= p.softcap;
        }
        if (masked) {
          const int32_t i = static_cast<int32_t>(key);
          score = (at[c] >= i) & (at[c] - window < i) ? score : Lanes{} + kNoScore;
        }
        store_lanes(score, s + key * W + c * kLanes);
        top[c] = score > top[c] ? score : top[c];
      }
    }
    for (int c = 0; c < V; ++c) {
      Lanes before;
      load_lanes(most + c * kLanes, &before);
      exp_lanes(before - top[c], &shrink[c]);
      sum[c] *= shrink[c];
      store_lanes(top[c], most + c * kLanes);
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
    for (int c = 0; c < V; ++c) store_lanes(sum[c], total + c * kLanes);
    int64_t d = 0;
    const float *first = v + low * p.D, *weights = s + low * W;
    for (; d + kUnroll <= p.D; d += kUnroll) {
      Panel<V>::template mix<kUnroll>(first + d, weights, high - low, p.D, shrink, o + d * W);
    }
    for (; d < p.D; ++d)
      Panel<V>::template mix<1>(first + d, weights, high - low, p.D, shrink, o + d * W);
  }

  static SARM_INLINE void run(const Attention<T>& p, const AttentionRun& run, int64_t g,
                              int64_t begin, int64_t end, float* scratch) {
    const int64_t D = p.D, R = p.H / p.G, rows = (end - begin) * R;
    const int64_t panels = (rows + W - 1) / W;
    float* k = scratch;
    float* v = k + kTileKeys * D;
    float* s = v + kTileKeys * D;
    float* q = s + kTileKeys * W;
    float* o = q + panels * D * W;
    float* most = o + panels * D * W;
    float* total = most + panels * W;
    int32_t* position = reinterpret_cast<int32_t*>(total + panels * W);
    std::fill(o, o + panels * D * W, 0.0f);
    std::fill(total, total + panels * W, 0.0f);
    std::fill(most, most + panels * W, kNoScore);
    for (int64_t r = 0; r < panels * W; ++r) {
      const int64_t row = std::min(r, rows - 1);  // the last panel is filled with a real row
      const int64_t token = begin + row / R;
      const T* from = p.q + ((run.first + token) * p.H + g * R + row % R) * D;
      float* to = q + r / W * D * W + r % W;
      for (int64_t d = 0; d < D; ++d) to[d * W] = to_float(from[d]) * p.scale;
      position[r] = static_cast<int32_t>(run.position + token);
    }
    const int64_t last = run.position + end;  // one behind the last key that is seen
    int64_t start = 0;
    if (p.window > 0) start = std::max<int64_t>(0, position[0] - p.window + 1);
    const AttentionRange* range = p.ranges + run.range;
    int64_t passed = 0;  // keys of the ranges before
    for (int64_t tile = start / kTileKeys * kTileKeys; tile < last; tile += kTileKeys) {
      const int64_t count = std::min(kTileKeys, last - tile);
      for (int64_t i = 0; i < count; ++i) {
        while (tile + i >= passed + range->count) passed += range++->count;
        const int64_t at = ((range->first + tile + i - passed) * p.G + g) * D;
        copy_row(p.k + at, D, k + i * D);
        copy_row(p.v + at, D, v + i * D);
      }
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t least = position[panel * W], greatest = position[panel * W + W - 1];
        const int64_t high = std::min(count, greatest + 1 - tile);
        const int64_t low =
            p.window > 0 ? std::max<int64_t>(0, least - p.window + 1 - tile) : int64_t{0};
        if (low >= high) continue;
        step(p, k, v, tile, low, high, least, q + panel * D * W, position + panel * W,
             most + panel * W, total + panel * W, s, o + panel * D * W);
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      T* to = p.out + ((run.first + begin + row / R) * p.H + g * R + row % R) * D;
      const float* from = o + row / W * D * W + row % W;
      for (int64_t d = 0; d < D; ++d) store(from[d * W] / total[row], to + d);
    }
  }
};

}  // namespace

int64_t attention_block(int64_t heads_per_group) {
  return std::max<int64_t>(1, kPanels * panel_vectors() * kLanes / heads_per_group);
}

int64_t attention_scratch(int64_t heads_per_group, int64_t D) {
  const int64_t W = panel_vectors() * kLanes;
  const int64_t rows = attention_block(heads_per_group) * heads_per_group;
  const int64_t panels = (rows + W - 1) / W;
  return kTileKeys * (2 * D + W) + panels * W * (2 * D + 3);
}

template <class T>
void attend_block(const Attention<T>& problem, const AttentionRun& run, int64_t g, int64_t begin,
                  int64_t end, float* scratch) {
  if (panel_vectors() == 3) {
    run_widest<AttendBlock<T, 3>>(problem, run, g, begin, end, scratch);
  } else {
    run_widest<AttendBlock<T, 1>>(problem, run, g, begin, end, scratch);
  }
}

template void attend_block(const Attention<float>&, const AttentionRun&, int64_t, int64_t, int64_t,
                           float*);
template void attend_block(const Attention<bf16>&, const AttentionRun&, int64_t, int64_t, int64_t,
                           float*);

}  // namespace sarm::cpu
