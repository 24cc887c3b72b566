// Causal attention of packed sequences that share prefixes, on raw pointers. Torch-free.
//
//   T  packed queries    S  packed keys    H  query heads    G  key heads    D  head width
//   R = H / G            rows: the T * R queries of a key head, token by token
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace sarm::cpu {

// Queries [first, first + count), at positions position, position + 1, ... of a sequence whose
// keys are the rows of ranges [range, range + ranges), joined.
struct AttentionRun {
  int64_t first, count, position, range, ranges;
};

struct AttentionRange {
  int64_t first, count;
};

// q, out (T, H, D); k, v (S, G, D). A query sees keys at positions <= its own; with window > 0 the
// last `window` of those. softcap > 0: scores become softcap * tanh(score / softcap).
template <class T>
struct Attention {
  const T *q, *k, *v;
  T* out;
  const AttentionRange* ranges;
  int64_t H, G, D, window;
  float scale, softcap;
};

// Tokens of a run that attend_block takes at most: a tile of keys and values, copied once, serves
// them all.
int64_t attention_block(int64_t heads_per_group);

// Floats of scratch, aligned to 64 bytes, that attend_block needs.
int64_t attention_scratch(int64_t heads_per_group, int64_t D);

// out of tokens [begin, end) of a run and of the query heads of key head g.
//
// fp32 arithmetic whatever T is. A query's bits depend on its sequence only: keys are taken in
// tiles that begin at multiples of the tile size in the sequence (not in the packing), in order;
// a query is a lane of its own; and a tile in which it sees nothing changes none of its bits.
template <class T>
void attend_block(const Attention<T>& problem, const AttentionRun& run, int64_t g, int64_t begin,
                  int64_t end, float* scratch);

// Of a loss's gradient d_out (T, H, D) with respect to forward.out, which has been computed: d_q
// (T, H, D).
struct AttentionGradient {
  Attention<float> forward;
  const float* d_out;
  float* d_q;
};

// Floats of scratch, aligned to 64 bytes, that attend_backward needs for a run that ends with
// `keys` keys.
int64_t attention_backward_scratch(int64_t keys, int64_t D, bool softcap);

// d_q of a run and of the query heads of key head g; adds to d_k and d_v (keys, D), whose rows are
// those of the run's ranges, joined.
void attend_backward(const AttentionGradient& problem, const AttentionRun& run, int64_t g,
                     float* d_k, float* d_v, float* scratch);

}  // namespace sarm::cpu
