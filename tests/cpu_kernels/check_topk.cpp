// topk_encode's two paths, put together as csrc/topk_encode.cpp does, with a plain loop for the
// GEMM: each against a full sort in double, and the screened path bit for bit against the direct.
#include <algorithm>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/topk_direct.h"
#include "cpu/topk_key.h"
#include "cpu/topk_screen.h"

namespace check {
namespace {

using sarm::bf16;
using sarm::fp16;
using sarm::cpu::Candidate;
using sarm::cpu::ScreenRow;

template <class T>
struct Problem {
  int64_t N, D, L, K;
  Exact<T> x, w;
  Exact<float> b;
};

template <class T>
Problem<T> random_problem(int64_t N, int64_t D, int64_t L, int64_t K, bool integers, Draw* draw) {
  if (integers) {
    auto x = draw->integers<T>(N * D), w = draw->integers<T>(L * D);
    return {N, D, L, K, std::move(x), std::move(w), draw->integers<float>(L)};
  }
  const double scale = 1.0 / std::sqrt(static_cast<double>(std::max<int64_t>(D, 1)));
  auto x = draw->normals<T>(N * D), w = draw->normals<T>(L * D, scale);
  return {N, D, L, K, std::move(x), std::move(w), draw->normals<float>(L, 0.1)};
}

// Everything that is known of a problem without the kernels, each (N, L): x @ w.T + b in double,
// the sum of the sizes of its terms (what fp32 rounds), and x @ w.T as a GEMM in fp32 may have it,
// summed from the other end than the exact products are.
struct Truth {
  std::vector<double> pre, size;
  std::vector<float> product;
};

template <class T>
Truth truth_of(const Problem<T>& p) {
  std::vector<double> x(p.N * p.D), w(p.L * p.D);
  for (size_t i = 0; i < x.size(); ++i) x[i] = decode(p.x[i]);
  for (size_t i = 0; i < w.size(); ++i) w[i] = decode(p.w[i]);
  Truth truth;
  for (int64_t n = 0; n < p.N; ++n) {
    for (int64_t l = 0; l < p.L; ++l) {
      double pre = p.b[l], size = std::fabs(pre);
      float product = 0.0f;
      for (int64_t i = p.D; i-- > 0;) {
        const double term = x[n * p.D + i] * w[l * p.D + i];
        pre += term;
        size += std::fabs(term);
        product += static_cast<float>(term);
      }
      truth.pre.push_back(pre);
      truth.size.push_back(size);
      truth.product.push_back(product);
    }
  }
  return truth;
}

struct TopK {
  TopK(int64_t N, int64_t K) : vals(N * K), idx(N * K) {}
  Exact<float> vals;
  Exact<int64_t> idx;
};

// ---- against a sort in double --------------------------------------------------------------

template <class T>
void compare(const char* what, const Problem<T>& p, const Truth& truth, const TopK& got,
             bool exact) {
  std::vector<int64_t> order(p.L);
  for (int64_t n = 0; n < p.N; ++n) {
    const double* pre = truth.pre.data() + n * p.L;
    double size = 0;
    for (int64_t l = 0; l < p.L; ++l) {
      order[l] = l;
      const double terms = truth.size[n * p.L + l];
      if (std::isfinite(terms)) size = std::max(size, terms);
    }
    std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) {
      if (pre[i] != pre[i] || pre[j] != pre[j]) return pre[i] != pre[i] && pre[j] == pre[j];
      return pre[i] > pre[j];
    });
    const double tolerance = exact ? 0.0 : (p.D + 2) * kUnit * size;
    std::vector<bool> seen(p.L, false);
    for (int64_t j = 0; j < p.K; ++j) {
      const float v = got.vals[n * p.K + j];
      const int64_t l = got.idx[n * p.K + j];
      if (l < 0 || l >= p.L || seen[l]) fail("%s: row %ld, column %ld: index %ld", what, n, j, l);
      seen[l] = true;
      if (exact && l != order[j]) {
        fail("%s: row %ld, column %ld: index %ld, expected %ld", what, n, j, l, order[j]);
      }
      expect_near(what, v, pre[l], tolerance);
      expect_near(what, v, pre[order[j]], tolerance);
      if (j == 0) continue;
      const float before = got.vals[n * p.K + j - 1];
      if (!(before >= v) && before == before) fail("%s: row %ld is not descending", what, n);
      if (same(before, v) && got.idx[n * p.K + j - 1] > l) {
        fail("%s: row %ld: equal values, higher index first", what, n);
      }
    }
  }
}

// ---- the direct path -----------------------------------------------------------------------

template <class T>
void encode_direct(const Problem<T>& p, const std::vector<int64_t>& rows, int64_t splits,
                   TopK* out) {
  const int64_t stride = sarm::cpu::direct_stride(p.K);
  for (size_t first = 0; first < rows.size(); first += sarm::cpu::kDirectRows) {
    const int64_t R = std::min<int64_t>(sarm::cpu::kDirectRows, rows.size() - first);
    Exact<float> wide(R * p.D);
    Exact<const float*> x(R);
    Exact<ScreenRow> unused(R);
    for (int64_t r = 0; r < R; ++r) {
      x[r] = wide.data() + r * p.D;
      sarm::cpu::prepare_rows(p.x.data() + rows[first + r] * p.D, 1, p.D, unused.data() + r,
                              wide.data() + r * p.D);
    }
    std::vector<std::vector<uint64_t>> found(R);
    for (int64_t s = 0; s < splits; ++s) {
      Exact<uint64_t> keys(R * stride);
      Exact<int64_t> count(R);
      const int64_t begin = p.L * s / splits, end = p.L * (s + 1) / splits;
      sarm::cpu::direct_rows(x.data(), R, p.w.data(), p.b.data(), keys.data(), count.data(), begin,
                             end, p.K, p.D);
      for (int64_t r = 0; r < R; ++r) {
        if (count[r] != std::min(p.K, end - begin)) fail("direct_rows: count %ld", count[r]);
        const uint64_t* from = keys.data() + r * stride;
        found[r].insert(found[r].end(), from, from + count[r]);
      }
    }
    for (int64_t r = 0; r < R; ++r) {
      const int64_t n = rows[first + r];
      Exact<uint64_t> keys(found[r].data(), static_cast<int64_t>(found[r].size()));
      sarm::cpu::write_best(keys.data(), keys.size(), p.K, out->vals.data() + n * p.K,
                            out->idx.data() + n * p.K);
    }
  }
}

template <class T>
TopK encode_direct(const Problem<T>& p, int64_t splits) {
  TopK out(p.N, p.K);
  std::vector<int64_t> rows(p.N);
  for (int64_t n = 0; n < p.N; ++n) rows[n] = n;
  encode_direct(p, rows, splits, &out);
  return out;
}

template <class T>
void check_direct(Draw* draw) {
  const struct {
    int64_t N, D, L, K, splits;
  } shapes[] = {{1, 1, 1, 1, 1},      {3, 17, 40, 5, 1},     {8, 64, 300, 9, 2},
                {9, 65, 700, 300, 3}, {5, 80, 1000, 1, 4},   {11, 33, 90, 90, 4},
                {4, 0, 30, 7, 2},     {7, 130, 1500, 64, 1}, {2, 15, 2000, 257, 2}};
  for (const auto& s : shapes) {
    for (const bool integers : {false, true}) {
      const auto p = random_problem<T>(s.N, s.D, s.L, s.K, integers, draw);
      compare("direct", p, truth_of(p), encode_direct(p, s.splits), integers);
    }
  }
}

// ---- the screened path ---------------------------------------------------------------------

struct Cut {
  int64_t tile_rows, tile_latents, splits;
  bool sampled;  // norms of a sample of the latents
};

// Rows [r, r + R) and latents [l, l + C) of the GEMM's result.
template <class S>
Exact<S> tile_of(const Truth& truth, int64_t L, int64_t r, int64_t R, int64_t l, int64_t C) {
  Exact<S> tile(R * C);
  for (int64_t e = 0; e < R * C; ++e) {
    sarm::store(truth.product[(r + e / C) * L + l + e % C], tile.data() + e);
  }
  return tile;
}

template <class T>
void expect_widened(const Exact<float>& wide, const T* from) {
  for (int64_t i = 0; i < wide.size(); ++i) {
    if (!same(wide[i], decode(from[i]))) fail("widened %g to %g", decode(from[i]), wide[i]);
  }
}

// What the screen promises of a candidate, before its value is known exactly.
void expect_enclosed(const Truth& truth, int64_t L, int64_t n, const Candidate& c) {
  const double pre = truth.pre[n * L + c.latent];
  if (!(c.low <= pre && pre <= c.high)) {
    fail("row %ld, latent %u: %.9g is not in [%.9g, %.9g]", n, c.latent, pre, c.low, c.high);
  }
}

// Returns how many rows were left to the direct path.
template <class T, class S>
int64_t encode_screened(const Problem<T>& p, const Truth& truth, const Cut& cut, TopK* out) {
  const int64_t stride = sarm::cpu::screen_stride(p.K, p.L);
  Exact<ScreenRow> rows(cut.splits * p.N);
  Exact<Candidate> candidates(cut.splits * p.N * stride);
  Exact<float> x(p.N * p.D);
  for (int64_t s = 0; s < cut.splits; ++s) {
    sarm::cpu::prepare_rows(p.x.data(), p.N, p.D, rows.data() + s * p.N,
                            s == 0 ? x.data() : nullptr);
  }
  expect_widened(x, p.x.data());

  for (int64_t s = 0; s < cut.splits; ++s) {
    const int64_t end = p.L * (s + 1) / cut.splits;
    for (int64_t l = p.L * s / cut.splits, C; l < end; l += C) {
      C = std::min(cut.tile_latents, end - l);
      const Exact<T> w(p.w.data() + l * p.D, C * p.D);
      const Exact<float> bias(p.b.data() + l, C);
      Exact<float> error(C), wide(C * p.D);
      if (cut.sampled) {
        sarm::cpu::sample_latents(w.data(), C, p.D, error.data());
      } else {
        sarm::cpu::prepare_latents(w.data(), C, p.D, error.data(), wide.data());
        expect_widened(wide, w.data());
      }
      for (int64_t r = 0, R; r < p.N; r += R) {
        R = std::min(cut.tile_rows, p.N - r);
        const auto tile = tile_of<S>(truth, p.L, r, R, l, C);
        sarm::cpu::screen_tile(tile.data(), bias.data(), error.data(), rows.data() + s * p.N + r,
                               candidates.data() + (s * p.N + r) * stride, R, C, l, p.K, p.L);
      }
    }
  }

  std::vector<float> lows;
  std::vector<int64_t> undecided;
  for (int64_t n = 0; n < p.N; ++n) {
    bool left = false;
    for (int64_t s = 0; s < cut.splits; ++s) left |= rows[s * p.N + n].undecided;
    for (int64_t s = 0; s < cut.splits; ++s) rows[s * p.N + n].undecided = left;
    if (left) {
      undecided.push_back(n);
      continue;
    }
    sarm::cpu::tighten_row(rows.data() + n, candidates.data() + n * stride, cut.splits, p.N, p.K,
                           p.L, &lows);
    if (rows[n].undecided) {  // fewer than K latents above -inf
      undecided.push_back(n);
      continue;
    }
    for (int64_t s = 0; s < cut.splits && !cut.sampled; ++s) {
      const Candidate* c = candidates.data() + (s * p.N + n) * stride;
      for (int64_t i = 0; i < rows[s * p.N + n].count; ++i) expect_enclosed(truth, p.L, n, c[i]);
    }
  }
  for (int64_t s = 0; s < cut.splits; ++s) {
    sarm::cpu::rescore(rows.data() + s * p.N, candidates.data() + s * p.N * stride, p.N, x.data(),
                       p.w.data(), p.b.data(), p.L * s / cut.splits, p.L * (s + 1) / cut.splits,
                       p.K, p.D, p.L);
  }
  for (int64_t n = 0; n < p.N; ++n) {
    if (rows[n].undecided) continue;
    std::vector<uint64_t> keys;
    for (int64_t s = 0; s < cut.splits; ++s) {
      const Candidate* c = candidates.data() + (s * p.N + n) * stride;
      for (int64_t i = 0; i < rows[s * p.N + n].count; ++i) {
        keys.push_back(sarm::cpu::make_key(c[i].low, c[i].latent));
      }
    }
    const int64_t found = static_cast<int64_t>(keys.size());
    if (found < p.K) fail("screened: row %ld has %ld candidates of %ld", n, found, p.K);
    sarm::cpu::write_best(keys.data(), found, p.K, out->vals.data() + n * p.K,
                          out->idx.data() + n * p.K);
  }
  encode_direct(p, undecided, 1, out);
  return static_cast<int64_t>(undecided.size());
}

enum class Left { none, some, any };  // rows that the direct path must get

template <class T, class S>
void compare_paths(const char* what, const Problem<T>& p, const Truth& truth, const TopK& direct,
                   Left left) {
  const Cut cuts[] = {{p.N, p.L, 1, false}, {3, 64, 1, false},   {4, 100, 1, true},
                      {5, 3, 2, false},     {p.N, 37, 3, false}, {2, 50, 4, true}};
  for (const Cut& cut : cuts) {
    TopK got(p.N, p.K);
    const int64_t undecided = encode_screened<T, S>(p, truth, cut, &got);
    if (left == Left::none && undecided != 0) fail("%s: %ld rows undecided", what, undecided);
    if (left == Left::some && undecided == 0) fail("%s: no row undecided", what);
    for (int64_t e = 0; e < p.N * p.K; ++e) {
      if (got.idx[e] != direct.idx[e] || !same(got.vals[e], direct.vals[e])) {
        fail("%s, K=%ld, tiles of %ld, %ld splits: entry %ld is (%.9g, %ld), direct (%.9g, %ld)",
             what, p.K, cut.tile_latents, cut.splits, e, got.vals[e], got.idx[e], direct.vals[e],
             direct.idx[e]);
      }
    }
  }
}

template <class T>
struct Hard {
  const char* name;
  Left left;
  void (*change)(Problem<T>* p);
};

template <class T>
const Hard<T> kHard[] = {
    {"random", Left::none, [](Problem<T>*) {}},
    {"zero row", Left::any,
     [](Problem<T>* p) { std::fill_n(p->x.data() + 3 * p->D, p->D, encode<T>(0)); }},
    {"constant rows", Left::some,
     [](Problem<T>* p) {
       std::fill_n(p->x.data() + 2 * p->D, 2 * p->D, encode<T>(0));
       std::fill_n(p->b.data(), p->L, 0.0f);
     }},
    {"equal latents", Left::some,
     [](Problem<T>* p) {
       for (int64_t l = 1; l < p->L; ++l) std::copy_n(p->w.data(), p->D, p->w.data() + l * p->D);
       std::fill_n(p->b.data(), p->L, 0.0f);
     }},
    {"latents in pairs", Left::any,
     [](Problem<T>* p) {
       for (int64_t l = 1; l < p->L; l += 2) {
         std::copy_n(p->w.data() + (l - 1) * p->D, p->D, p->w.data() + l * p->D);
         p->b[l] = p->b[l - 1];
       }
     }},
    {"NaN in a row", Left::some, [](Problem<T>* p) { p->x[2 * p->D + 5] = encode<T>(kNan); }},
    {"inf in a row", Left::some, [](Problem<T>* p) { p->x[p->N * p->D - 1] = encode<T>(kInf); }},
    {"NaN in a latent", Left::some, [](Problem<T>* p) { p->w[77 * p->D + 3] = encode<T>(kNan); }},
    {"-inf in a latent", Left::any, [](Problem<T>* p) { p->w[80 * p->D + 3] = encode<T>(-kInf); }},
    {"NaN bias", Left::some, [](Problem<T>* p) { p->b[5] = kNan; }},
    {"+inf bias", Left::none, [](Problem<T>* p) { p->b[99] = kInf; }},
    {"half of the latents at -inf", Left::none,
     [](Problem<T>* p) {
       for (int64_t l = 0; l < p->L; l += 2) p->b[l] = -kInf;
     }},
    {"four latents alive", Left::any,
     [](Problem<T>* p) { std::fill_n(p->b.data() + 4, p->L - 4, -kInf); }},
    {"ascending", Left::none,  // every entry passes: the buffer fills again and again
     [](Problem<T>* p) {
       for (int64_t l = 0; l < p->L; ++l) p->b[l] = 10.0f * static_cast<float>(l);
     }},
    {"descending", Left::none,
     [](Problem<T>* p) {
       for (int64_t l = 0; l < p->L; ++l) p->b[l] = -10.0f * static_cast<float>(l);
     }},
    {"biases that cancel the products", Left::any,
     [](Problem<T>* p) {
       for (int64_t n = 0; n < p->N; ++n) p->x[n * p->D] = encode<T>(1);
       for (int64_t l = 0; l < p->L; l += 3) {
         p->w[l * p->D] = encode<T>(64);
         p->b[l] = -64.0f;
       }
     }},
    {"biases beyond what fp32 resolves", Left::any,
     [](Problem<T>* p) {
       for (int64_t l = 0; l < p->L; ++l) p->b[l] += 1e6f;
     }},
};

// 640 latents, so that even a quarter of them overflows the buffer of K = 70 (140 entries).
template <class T, class S>
void check_screened(Draw* draw) {
  for (const int64_t K : {1, 5, 70}) {
    for (const Hard<T>& hard : kHard<T>) {
      auto p = random_problem<T>(10, 33, 640, K, false, draw);
      hard.change(&p);
      const Truth truth = truth_of(p);
      const TopK direct = encode_direct(p, 2);
      compare(hard.name, p, truth, direct, false);
      // Rounding to bf16 blurs what fp32 tells apart: it may leave more rows, never fewer.
      const bool blurred = std::is_same_v<S, bf16> && hard.left == Left::none;
      compare_paths<T, S>(hard.name, p, truth, direct, blurred ? Left::any : hard.left);
    }
  }
  const struct {
    int64_t N, D, L, K;
  } shapes[] = {{1, 1, 1, 1},   {9, 16, 65, 64},   {7, 65, 500, 12}, {12, 48, 130, 130},
                {5, 3, 700, 2}, {3, 129, 257, 33}, {6, 0, 50, 3},    {4, 20, 1100, 300}};
  for (const auto& s : shapes) {
    for (const bool integers : {false, true}) {
      const auto p = random_problem<T>(s.N, s.D, s.L, s.K, integers, draw);
      const Truth truth = truth_of(p);
      const TopK direct = encode_direct(p, 1);
      compare("ragged", p, truth, direct, integers);
      compare_paths<T, S>("ragged", p, truth, direct, Left::any);
    }
  }
}

}  // namespace

void direct() {
  Draw draw(3);
  check_direct<float>(&draw);
  check_direct<bf16>(&draw);
  check_direct<fp16>(&draw);
}

void screened() {
  Draw draw(4);
  check_screened<float, float>(&draw);
  check_screened<bf16, float>(&draw);
  check_screened<fp16, float>(&draw);
}

void screened_bf16_tiles() {
  Draw draw(5);
  check_screened<bf16, bf16>(&draw);
}

}  // namespace check
