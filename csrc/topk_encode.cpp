// topk_encode on the CPU: cuts the work into tiles, lets the vendor's GEMM fill them while they
// stay in cache, and screens each one before the next (cpu/topk_screen.h). Threads share rows, or
// latents where rows are few; the (N, L) product is never stored.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <memory>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/pages.h"
#include "cpu/topk_direct.h"
#include "cpu/topk_key.h"
#include "cpu/topk_screen.h"

namespace sarm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

// Extra memory: below 64 MiB in all for two threads, at any N; 10 MiB for each further thread.
constexpr int64_t kCandidateBytes = 24 << 20;  // of a block of rows
constexpr int64_t kWideRowBytes = 16 << 20;    // a block of rows of x, as fp32
constexpr int64_t kWideTileBytes = 8 << 20;    // a thread's rows of w, as fp32
constexpr int64_t kTileBytes = 2 << 20;        // a thread's pre-activations: they stay in L2
constexpr int64_t kTileLatents = 1024;
constexpr int64_t kGroupRows = 256;  // rows a thread needs for a GEMM at nearly full speed
constexpr int64_t kManyRows = 1024;  // rows from which the norms of all latents cost nothing
constexpr int64_t kMostDirect = 8;   // rows up to which the direct path is faster

// One call: x (N, D), w (L, D) of T, b (L,) and vals, idx (N, K).
template <class T>
struct Problem {
  const T* x;
  const T* w;
  const float* b;
  float* vals;
  int64_t* idx;
  int64_t N, D, L, K;
};

constexpr ScalarType dtype_of(const float*) { return ScalarType::Float; }
constexpr ScalarType dtype_of(const bf16*) { return ScalarType::BFloat16; }
constexpr ScalarType dtype_of(const fp16*) { return ScalarType::Half; }

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class S>
Tensor matrix(const S* data, int64_t rows, int64_t columns, int64_t row_stride,
              int64_t column_stride) {
  return torch::stable::from_blob(const_cast<S*>(data), {rows, columns},
                                  {row_stride, column_stride},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  dtype_of(static_cast<const S*>(nullptr)));
}

// tile (R, C) = x (R, D) @ w (C, D).T, straight to the kernel: the dispatcher would ask autograd
// and modes about tensors that have neither.
template <class S>
void gemm(const S* x, const S* w, S* tile, int64_t R, int64_t C, int64_t D) {
  const Tensor out = matrix(tile, R, C, C, 1);
  const Tensor a = matrix(x, R, D, D, 1), b = matrix(w, D, C, 1, D);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// Exact products for a list of rows: no GEMM. Threads share the latents.
template <class T>
void encode_direct(const Problem<T>& p, const std::vector<int64_t>& rows) {
  const int64_t stride = cpu::direct_stride(p.K);
  const int64_t splits = std::min<int64_t>(torch::stable::get_num_threads(), p.L);
  const int64_t most = std::min<int64_t>(cpu::kDirectRows, rows.size());
  std::vector<float> wide(most * p.D);
  std::vector<uint64_t> keys(splits * most * stride), merged(splits * p.K);
  std::vector<int64_t> counts(splits * most);
  const float* pointers[cpu::kDirectRows];
  cpu::ScreenRow unused[cpu::kDirectRows];
  for (size_t first = 0; first < rows.size(); first += most) {
    const int64_t R = std::min<int64_t>(most, rows.size() - first);
    for (int64_t r = 0; r < R; ++r) {
      cpu::prepare_rows(p.x + rows[first + r] * p.D, 1, p.D, unused + r, wide.data() + r * p.D);
      pointers[r] = wide.data() + r * p.D;
    }
    parallel_for(0, splits, 1, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        cpu::direct_rows(pointers, R, p.w, p.b, keys.data() + s * most * stride,
                         counts.data() + s * most, p.L * s / splits, p.L * (s + 1) / splits, p.K,
                         p.D);
      }
    });
    for (int64_t r = 0; r < R; ++r) {
      uint64_t* to = merged.data();
      for (int64_t s = 0; s < splits; ++s) {
        to = std::copy_n(keys.data() + (s * most + r) * stride, counts[s * most + r], to);
      }
      const int64_t n = rows[first + r];
      cpu::write_best(merged.data(), to - merged.data(), p.K, p.vals + n * p.K, p.idx + n * p.K);
    }
  }
}

// How the work of one call is cut.
struct Plan {
  int64_t block;   // rows whose candidates are held at once
  int64_t groups;  // parts of a block's rows, and
  int64_t splits;  // parts of the latents: groups * splits tasks
  int64_t tile_latents, tile_rows;
};

template <class T, class S>
Plan make_plan(const Problem<T>& p) {
  constexpr bool narrow = !std::is_same_v<T, float>, widen = !std::is_same_v<T, S>;
  const int64_t threads = torch::stable::get_num_threads();
  Plan plan;
  plan.groups = std::clamp<int64_t>(p.N / kGroupRows, 1, threads);
  plan.splits = std::clamp<int64_t>(threads / plan.groups, 1, divide_up(p.L, kTileLatents));
  const int64_t candidates = plan.splits * cpu::screen_stride(p.K, p.L) * sizeof(cpu::Candidate);
  int64_t most = kCandidateBytes / candidates;
  if (narrow) most = std::min<int64_t>(most, kWideRowBytes / (p.D * sizeof(float)));
  most = std::max<int64_t>(most, 1);
  plan.block = divide_up(p.N, divide_up(p.N, most));  // blocks of equal size
  plan.tile_latents = std::min(kTileLatents, p.L);
  if (widen) {
    const int64_t fit = kWideTileBytes / (p.D * static_cast<int64_t>(sizeof(float)));
    plan.tile_latents = std::min(plan.tile_latents, std::max<int64_t>(fit, 16));
  }
  plan.tile_rows =
      std::max<int64_t>(1, kTileBytes / (plan.tile_latents * static_cast<int64_t>(sizeof(S))));
  return plan;
}

// One block of rows. Task (g, s) is the rows of group g and the latents of split s.
template <class T, class S>
class Block {
  static constexpr bool kNarrow = !std::is_same_v<T, float>;  // x and w are 16-bit
  static constexpr bool kWiden = !std::is_same_v<T, S>;       // the GEMM runs on fp32 copies

 public:
  Block(const Problem<T>& problem, const Plan& plan, int64_t first, int64_t count)
      : p(problem),
        plan(plan),
        first(first),
        count(count),
        rows(plan.splits * count),
        candidates(new cpu::Candidate[plan.splits * count * stride]),
        wide(kNarrow ? new float[count * p.D] : nullptr) {
    advise_huge_pages(candidates.get(), plan.splits * count * stride * sizeof(cpu::Candidate));
    parallel_for(0, count, kGroupRows, [&](int64_t begin, int64_t end) {
      float* to = kNarrow ? wide.get() + begin * p.D : nullptr;
      cpu::prepare_rows(p.x + (first + begin) * p.D, end - begin, p.D, rows.data() + begin, to);
      for (int64_t s = 1; s < plan.splits; ++s) {
        std::copy(rows.data() + begin, rows.data() + end, rows.data() + s * count + begin);
      }
    });
  }

  // Streams the latents of a task past its rows.
  void screen(int64_t task) {
    const Range row = rows_of(task), latent = latents_of(task);
    const int64_t C = plan.tile_latents, R = std::min(plan.tile_rows, row.end - row.begin);
    std::unique_ptr<S[]> tile(new S[R * C]);
    std::unique_ptr<float[]> wide_w(kWiden ? new float[C * p.D] : nullptr);
    std::vector<float> error(C);
    for (int64_t l = latent.begin; l < latent.end; l += C) {
      const int64_t width = std::min(C, latent.end - l);
      const T* w = p.w + l * p.D;
      if (kWiden || row.end - row.begin >= kManyRows) {
        cpu::prepare_latents(w, width, p.D, error.data(), wide_w.get());
      } else {
        cpu::sample_latents(w, width, p.D, error.data());
      }
      for (int64_t r = row.begin; r < row.end; r += R) {
        const int64_t height = std::min(R, row.end - r);
        if constexpr (kWiden) {
          gemm<float>(wide.get() + r * p.D, wide_w.get(), tile.get(), height, width, p.D);
        } else {
          gemm<T>(p.x + (first + r) * p.D, w, tile.get(), height, width, p.D);
        }
        cpu::screen_tile(tile.get(), p.b + l, error.data(), row_of(task, r), candidates_of(task, r),
                         height, width, l, p.K, p.L);
      }
    }
  }

  void tighten(int64_t begin, int64_t end) {
    std::vector<float> lows;
    for (int64_t r = begin; r < end; ++r) {
      bool undecided = false;
      for (int64_t s = 0; s < plan.splits; ++s) undecided |= rows[s * count + r].undecided;
      for (int64_t s = 0; s < plan.splits; ++s) rows[s * count + r].undecided = undecided;
      if (undecided) continue;
      cpu::tighten_row(rows.data() + r, candidates.get() + r * stride, plan.splits, count, p.K, p.L,
                       &lows);
    }
  }

  void rescore(int64_t task) {
    const Range row = rows_of(task), latent = latents_of(task);
    cpu::rescore(row_of(task, row.begin), candidates_of(task, row.begin), row.end - row.begin,
                 fp32_rows() + row.begin * p.D, p.w, p.b, latent.begin, latent.end, p.K, p.D, p.L);
  }

  void write(int64_t begin, int64_t end) {
    std::vector<uint64_t> keys;
    for (int64_t r = begin; r < end; ++r) {
      if (rows[r].undecided) continue;
      keys.clear();
      for (int64_t s = 0; s < plan.splits; ++s) {
        const cpu::Candidate* c = candidates.get() + (s * count + r) * stride;
        for (int64_t i = 0; i < rows[s * count + r].count; ++i) {
          keys.push_back(cpu::make_key(c[i].low, c[i].latent));
        }
      }
      const int64_t n = first + r;
      cpu::write_best(keys.data(), static_cast<int64_t>(keys.size()), p.K, p.vals + n * p.K,
                      p.idx + n * p.K);
    }
  }

  void append_undecided(std::vector<int64_t>* to) const {
    for (int64_t r = 0; r < count; ++r) {
      if (rows[r].undecided) to->push_back(first + r);
    }
  }

 private:
  struct Range {
    int64_t begin, end;
  };

  Range rows_of(int64_t task) const {
    const int64_t g = task % plan.groups;
    return {count * g / plan.groups, count * (g + 1) / plan.groups};
  }
  Range latents_of(int64_t task) const {
    const int64_t s = task / plan.groups;
    return {p.L * s / plan.splits, p.L * (s + 1) / plan.splits};
  }
  cpu::ScreenRow* row_of(int64_t task, int64_t r) {
    return rows.data() + task / plan.groups * count + r;
  }
  cpu::Candidate* candidates_of(int64_t task, int64_t r) {
    return candidates.get() + (task / plan.groups * count + r) * stride;
  }
  const float* fp32_rows() const {
    if constexpr (kNarrow) {
      return wide.get();
    } else {
      return p.x + first * p.D;
    }
  }

  const Problem<T>& p;
  const Plan& plan;
  const int64_t first, count;  // rows [first, first + count) of x
  const int64_t stride = cpu::screen_stride(p.K, p.L);
  std::vector<cpu::ScreenRow> rows;              // (splits, count)
  std::unique_ptr<cpu::Candidate[]> candidates;  // (splits, count, stride), not touched yet
  std::unique_ptr<float[]> wide;                 // (count, D): 16-bit rows of x as fp32
};

template <class T, class S>
void encode_screened(const Problem<T>& p) {
  const Plan plan = make_plan<T, S>(p);
  std::vector<int64_t> undecided;
  const int64_t tasks = plan.groups * plan.splits;
  for (int64_t first = 0; first < p.N; first += plan.block) {
    const int64_t count = std::min(plan.block, p.N - first);
    Block<T, S> block(p, plan, first, count);
    parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) block.screen(task);
    });
    parallel_for(0, count, 16, [&](int64_t begin, int64_t end) { block.tighten(begin, end); });
    parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) block.rescore(task);
    });
    parallel_for(0, count, 16, [&](int64_t begin, int64_t end) { block.write(begin, end); });
    block.append_undecided(&undecided);
  }
  encode_direct(p, undecided);
}

template <class T>
void encode(const Tensor& x, const Tensor& w, const Tensor& b, Tensor* vals, Tensor* idx,
            bool native_bf16) {
  const Problem<T> p{static_cast<const T*>(x.const_data_ptr()),
                     static_cast<const T*>(w.const_data_ptr()),
                     b.const_data_ptr<float>(),
                     vals->mutable_data_ptr<float>(),
                     idx->mutable_data_ptr<int64_t>(),
                     x.size(0),
                     x.size(1),
                     w.size(0),
                     vals->size(1)};
  if (p.N <= kMostDirect || p.D == 0) {
    std::vector<int64_t> rows(p.N);
    for (int64_t n = 0; n < p.N; ++n) rows[n] = n;
    return encode_direct(p, rows);
  }
  if constexpr (std::is_same_v<T, bf16>) {
    if (native_bf16) return encode_screened<T, bf16>(p);
  }
  encode_screened<T, float>(p);
}

// native_bf16: run bf16 GEMMs in bf16 and not on fp32 copies; right where the CPU has instructions
// for it (six times the rate of fp32), and a tenth of the speed where it has none.
std::tuple<Tensor, Tensor> topk_encode(Tensor x, Tensor w_enc, Tensor b_enc, int64_t k,
                                       bool native_bf16) {
  const char* op = "sarm_cpu::topk_encode";
  for (const Tensor* t : {&x, &w_enc, &b_enc}) {
    STD_TORCH_CHECK(t->is_cpu() && t->is_contiguous(), op, ": needs contiguous CPU tensors");
  }
  STD_TORCH_CHECK(x.dim() == 2 && w_enc.dim() == 2 && x.size(1) == w_enc.size(1), op,
                  ": x and w_enc must be matrices with one d_model");
  STD_TORCH_CHECK(x.scalar_type() == w_enc.scalar_type(), op, ": x and w_enc must have one dtype");
  const int64_t N = x.size(0), L = w_enc.size(0);
  STD_TORCH_CHECK(b_enc.scalar_type() == ScalarType::Float && b_enc.numel() == L, op,
                  ": b_enc must be float32 with one value for each of ", L, " latents");
  STD_TORCH_CHECK(k >= 1 && k <= L && L < (int64_t{1} << 32), op,
                  ": needs 1 <= k <= n_latents < 2^32, got k=", k, ", n_latents=", L);
  Tensor vals = torch::stable::new_empty(x, {N, k}, ScalarType::Float);
  Tensor idx = torch::stable::new_empty(x, {N, k}, ScalarType::Long);
  if (N == 0) return {vals, idx};
  switch (x.scalar_type()) {
    case ScalarType::Float:
      encode<float>(x, w_enc, b_enc, &vals, &idx, false);
      break;
    case ScalarType::BFloat16:
      encode<bf16>(x, w_enc, b_enc, &vals, &idx, native_bf16);
      break;
    case ScalarType::Half:
      encode<fp16>(x, w_enc, b_enc, &vals, &idx, false);
      break;
    default:
      STD_TORCH_CHECK(false, op, ": x must be float32, bfloat16 or float16");
  }
  return {vals, idx};
}

}  // namespace
}  // namespace sarm

STABLE_TORCH_LIBRARY_FRAGMENT(sarm_cpu, m) {
  m.def(
      "topk_encode(Tensor x, Tensor w_enc, Tensor b_enc, int k, bool native_bf16) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(sarm_cpu, CPU, m) {
  m.impl("topk_encode", TORCH_BOX(&sarm::topk_encode));
}
