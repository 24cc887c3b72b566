// Screening: the part of topk_encode that keeps (N, L) pre-activations from ever being stored, and
// its values exact.
//
// A GEMM of the vendor library gives a tile of approximate pre-activations; its order of summation
// depends on the shape, and its output may be rounded to bf16. Each is known to lie within
//
//     [low, high] = pre -+ (||x|| * error[l] + kRelative * |pre| + rounding of the tile's output)
//
// of the exact one (the fp32 dot of lanes.h plus the bias). The K-th largest `low` seen so far is a
// lower bound of the row's K-th largest exact value, so an entry whose `high` does not reach it is
// dropped for good. Of the rest, K and the few that the error leaves undecided, the exact value is
// computed at the end. Values therefore do not depend on tiles, batches or threads.
//
// A row that this cannot decide within its buffer (ties by the hundred, NaN, overflow) is marked
// and left to topk_direct.h. Torch-free.
//
//   N  rows    D  d_model    L  latents    K  wanted    R  rows of a tile    C  latents of a tile
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.h"

namespace sarm::cpu {

struct Candidate {
  float low, high;
  uint32_t latent;
};

struct ScreenRow {
  float bound;  // an entry with high < bound is not among the K best
  float norm;   // ||x||
  int32_t count;
  bool undecided;  // left to the direct path
};

// Candidates a row's buffer holds between two selections, and the room it takes in memory.
int64_t screen_capacity(int64_t K, int64_t L);
int64_t screen_stride(int64_t K, int64_t L);

// error[l] of C rows of w (C, D), for products summed in fp32 in any order, and, if `wide` is not
// null, the rows as fp32.
template <class T>
void prepare_latents(const T* w, int64_t C, int64_t D, float* error, float* wide);

// The same without reading all of w, where that would cost more than a few rows' work on it: the
// norms of a sample, times two, stand for all. An error bound is for worst-case rounding, some
// sqrt(D) times the typical one, so that to be misjudged a latent would need a hundred times the
// sample's largest norm, and a pre-activation within rounding of the K-th.
template <class T>
void sample_latents(const T* w, int64_t C, int64_t D, float* error);

// ||x|| of R rows of x (R, D) and, if `wide` is not null, the rows as fp32.
template <class T>
void prepare_rows(const T* x, int64_t R, int64_t D, ScreenRow* rows, float* wide);

// Screens a tile (R, C) of x @ w.T for latents [latent, latent + C). bias and error: C values.
// rows: R; candidates: R buffers of screen_stride entries. S is float, or bf16 for a GEMM that
// rounds its output. Tiles of a row come in ascending order of latents.
template <class S>
void screen_tile(const S* tile, const float* bias, const float* error, ScreenRow* rows,
                 Candidate* candidates, int64_t R, int64_t C, int64_t latent, int64_t K, int64_t L);

// After the last tile: drops from the lists of one row (one a split, `apart` rows and candidates
// apart) what cannot be among the K best of them all. Undecided if fewer than K latents are above
// -inf. lows: scratch.
void tighten_row(ScreenRow* row, Candidate* candidates, int64_t splits, int64_t apart, int64_t K,
                 int64_t L, std::vector<float>* lows);

// Puts the exact value of every candidate of R rows into `low`. Works latent by latent, so that a
// row of w is read once: at 256 rows of x the candidates' rows are as much as half of w. x: (R, D)
// fp32; the candidates are of latents [begin, end).
template <class T>
void rescore(const ScreenRow* rows, Candidate* candidates, int64_t R, const float* x, const T* w,
             const float* bias, int64_t begin, int64_t end, int64_t K, int64_t D, int64_t L);

}  // namespace sarm::cpu
