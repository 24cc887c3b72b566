// sparse_value, gather_dot, segment_sum and group_by_latent against loops in double.
#include <algorithm>
#include <vector>

#include "check.h"
#include "cpu/kernels.h"

namespace check {
namespace {

using sarm::bf16;

struct Shape {
  int64_t N, K, L, D;
};

// Around the widths at which the kernels change their loop: 4 entries, 16 and 64 lanes, 1024
// columns; and empty in every dimension.
const Shape kShapes[] = {{1, 1, 1, 1},     {3, 4, 9, 16},    {2, 5, 7, 15},   {5, 3, 40, 17},
                         {4, 7, 11, 63},   {3, 8, 5, 64},    {2, 9, 30, 65},  {7, 6, 50, 130},
                         {1, 13, 20, 200}, {2, 5, 3, 1023},  {2, 6, 4, 1024}, {3, 7, 5, 1025},
                         {9, 31, 64, 33},  {1, 2, 3, 2100},  {0, 3, 4, 5},    {3, 0, 4, 5},
                         {3, 2, 4, 0},     {40, 1, 300, 12}, {60, 16, 8, 48}};

template <class T>
void sparse_value(const Shape& s, int64_t P, Draw* draw) {
  const auto vals = draw->normals<float>(s.N * s.K);
  const auto idx = draw->indices(s.N * s.K, s.L);
  const auto w = draw->normals<T>(P * s.L);
  Exact<float> out(s.N * P);
  const int64_t half = s.N / 2;  // two ranges, as two threads would have them
  sarm::cpu::sparse_value(vals.data(), idx.data(), w.data(), out.data(), 0, half, s.K, s.L, P);
  sarm::cpu::sparse_value(vals.data(), idx.data(), w.data(), out.data(), half, s.N, s.K, s.L, P);
  for (int64_t n = 0; n < s.N; ++n) {
    for (int64_t p = 0; p < P; ++p) {
      double exact = 0, size = 0;
      for (int64_t e = n * s.K; e < (n + 1) * s.K; ++e) {
        const double term = vals[e] * decode(w[p * s.L + idx[e]]);
        exact += term;
        size += std::fabs(term);
      }
      // summed in fp64 and rounded once
      const double tolerance = 1.001 * kUnit * std::fabs(exact) + s.K * 0x1p-51 * size;
      expect_near("sparse_value", out[n * P + p], exact, tolerance);
    }
  }
}

template <class T>
void gather_dot(const Shape& s, Draw* draw) {
  const auto y = draw->normals<T>(s.N * s.D);
  const auto idx = draw->indices(s.N * s.K, s.L);
  const auto w = draw->normals<T>(s.L * s.D);
  Exact<float> out(s.N * s.K), scratch(s.D);
  const int64_t half = s.N / 2;
  sarm::cpu::gather_dot(y.data(), idx.data(), w.data(), out.data(), scratch.data(), 0, half, s.K,
                        s.D);
  sarm::cpu::gather_dot(y.data(), idx.data(), w.data(), out.data(), scratch.data(), half, s.N, s.K,
                        s.D);
  for (int64_t e = 0; e < s.N * s.K; ++e) {
    double exact = 0, size = 0;
    for (int64_t i = 0; i < s.D; ++i) {
      const double term = decode(y[e / s.K * s.D + i]) * decode(w[idx[e] * s.D + i]);
      exact += term;
      size += std::fabs(term);
    }
    expect_near("gather_dot", out[e], exact, (s.D + 2) * kUnit * size);
  }
}

// Both uses of segment_sum on one set of entries: by token, and grouped by latent.
template <class T, class Out>
void segment_sum(const char* what, const Exact<float>& coef, const Exact<int64_t>& row,
                 const Exact<int64_t>& offset, const Exact<T>& matrix, int64_t D) {
  const int64_t S = offset.size() - 1, half = S / 2;
  Exact<Out> out(S * D);
  sarm::cpu::segment_sum(coef.data(), row.data(), offset.data(), matrix.data(), out.data(), 0, half,
                         D);
  sarm::cpu::segment_sum(coef.data(), row.data(), offset.data(), matrix.data(), out.data(), half, S,
                         D);
  constexpr double kRound = std::is_same_v<Out, float> ? 0.0 : 0x1p-8;
  for (int64_t s = 0; s < S; ++s) {
    for (int64_t i = 0; i < D; ++i) {
      double exact = 0, size = 0;
      for (int64_t e = offset[s]; e < offset[s + 1]; ++e) {
        const double term = coef[e] * decode(matrix[row[e] * D + i]);
        exact += term;
        size += std::fabs(term);
      }
      const double tolerance =
          (offset[s + 1] - offset[s] + 2) * kUnit * size + kRound * std::fabs(exact);
      expect_near(what, decode(out[s * D + i]), exact, tolerance);
    }
  }
}

template <class T, class Out>
void gather_sum(const Shape& s, Draw* draw) {
  const auto vals = draw->normals<float>(s.N * s.K);
  const auto idx = draw->indices(s.N * s.K, s.L);
  Exact<int64_t> offset(s.N + 1);
  for (int64_t n = 0; n <= s.N; ++n) offset[n] = n * s.K;
  segment_sum<T, Out>("gather_sum", vals, idx, offset, draw->normals<T>(s.L * s.D), s.D);
}

template <class T, class Out>
void scatter_outer(const Shape& s, Draw* draw) {
  const int64_t E = s.N * s.K;
  const auto a = draw->normals<float>(E);
  const auto idx = draw->indices(E, s.L);
  Exact<float> coef(E);
  Exact<int64_t> row(E), offset(s.L + 1);
  sarm::cpu::group_by_latent(a.data(), idx.data(), s.N, s.K, s.L, coef.data(), row.data(),
                             offset.data());
  // A stable sort by latent is unique: compare with the library's.
  std::vector<int64_t> order(E);
  for (int64_t e = 0; e < E; ++e) order[e] = e;
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t i, int64_t j) { return idx[i] < idx[j]; });
  for (int64_t e = 0; e < E; ++e) {
    if (coef[e] != a[order[e]] || row[e] != order[e] / s.K) fail("group_by_latent: entry %ld", e);
  }
  for (int64_t l = 0; l <= s.L; ++l) {
    const auto first =
        std::partition_point(order.begin(), order.end(), [&](int64_t e) { return idx[e] < l; });
    if (offset[l] != first - order.begin()) fail("group_by_latent: offset %ld", l);
  }
  segment_sum<T, Out>("scatter_outer", coef, row, offset, draw->normals<T>(s.N * s.D), s.D);
}

}  // namespace

void gathers() {
  Draw draw(2);
  for (const Shape& s : kShapes) {
    for (const int64_t P : {0, 1, 3}) {
      sparse_value<float>(s, P, &draw);
      sparse_value<bf16>(s, P, &draw);
    }
    gather_dot<float>(s, &draw);
    gather_dot<bf16>(s, &draw);
    gather_sum<float, float>(s, &draw);
    gather_sum<bf16, bf16>(s, &draw);
    scatter_outer<float, float>(s, &draw);
    scatter_outer<bf16, bf16>(s, &draw);
    scatter_outer<bf16, float>(s, &draw);
  }
}

}  // namespace check
