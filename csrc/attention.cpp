// attention on the CPU: checks the arguments and shares blocks of queries among threads.
#include "cpu/attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <tuple>
#include <vector>

namespace sarm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A block of tokens of one run and one key head.
struct Task {
  int64_t run, g, begin, end;
};

struct alignas(64) Line {
  float lanes[16];
};

void check_spans(const char* op, const cpu::AttentionRun* runs, int64_t n,
                 const cpu::AttentionRange* ranges, int64_t m, int64_t T, int64_t S) {
  for (int64_t i = 0; i < m; ++i) {
    STD_TORCH_CHECK(
        ranges[i].first >= 0 && ranges[i].count >= 0 && ranges[i].first + ranges[i].count <= S, op,
        ": range ", i, " is not in [0, ", S, ")");
  }
  int64_t queries = 0;
  for (int64_t i = 0; i < n; ++i) {
    const cpu::AttentionRun& run = runs[i];
    STD_TORCH_CHECK(run.first >= 0 && run.count >= 0 && run.first + run.count <= T, op, ": run ", i,
                    " is not in [0, ", T, ")");
    STD_TORCH_CHECK(run.range >= 0 && run.ranges >= 0 && run.range + run.ranges <= m, op, ": run ",
                    i, " has ranges outside of [0, ", m, ")");
    int64_t keys = 0;
    for (int64_t r = 0; r < run.ranges; ++r) keys += ranges[run.range + r].count;
    STD_TORCH_CHECK(
        run.position >= 0 && run.position + run.count <= keys && keys < (int64_t{1} << 30), op,
        ": run ", i, " ends at position ", run.position + run.count, " of ", keys, " keys");
    queries += run.count;
  }
  STD_TORCH_CHECK(queries == T, op, ": the runs have ", queries, " queries, q has ", T);
}

template <class T>
void attend(const cpu::Attention<T>& problem, const cpu::AttentionRun* runs, int64_t n) {
  const int64_t R = problem.H / problem.G, block = cpu::attention_block(R);
  std::vector<Task> tasks;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t g = 0; g < problem.G; ++g) {
      for (int64_t t = 0; t < runs[i].count; t += block) {
        tasks.push_back({i, g, t, std::min(t + block, runs[i].count)});
      }
    }
  }
  const int64_t count = static_cast<int64_t>(tasks.size());
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  const int64_t lines = cpu::attention_scratch(R, problem.D) / 16 + 1;
  std::atomic<int64_t> next{0};  // tasks are unequal: whoever is free takes one
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      std::unique_ptr<Line[]> scratch(new Line[lines]());
      for (int64_t t; (t = next.fetch_add(1)) < count;) {
        cpu::attend_block(problem, runs[tasks[t].run], tasks[t].g, tasks[t].begin, tasks[t].end,
                          scratch[0].lanes);
      }
    }
  });
}

template <class T>
void attend(const Tensor& q, const Tensor& k, const Tensor& v, Tensor* out, const Tensor& queries,
            const Tensor& ranges, double scale, int64_t window, double softcap) {
  const auto* runs = reinterpret_cast<const cpu::AttentionRun*>(queries.const_data_ptr<int64_t>());
  const auto* own = reinterpret_cast<const cpu::AttentionRange*>(ranges.const_data_ptr<int64_t>());
  check_spans("sarm_cpu::attention", runs, queries.size(0), own, ranges.size(0), q.size(0),
              k.size(0));
  const cpu::Attention<T> problem{static_cast<const T*>(q.const_data_ptr()),
                                  static_cast<const T*>(k.const_data_ptr()),
                                  static_cast<const T*>(v.const_data_ptr()),
                                  static_cast<T*>(out->mutable_data_ptr()),
                                  own,
                                  q.size(1),
                                  k.size(1),
                                  q.size(2),
                                  window,
                                  static_cast<float>(scale),
                                  static_cast<float>(softcap)};
  attend(problem, runs, queries.size(0));
}

void check(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& queries,
           const Tensor& ranges, int64_t window, double softcap) {
  for (const Tensor* t : {&q, &k, &v}) {
    STD_TORCH_CHECK(t->is_cpu() && t->is_contiguous() && t->dim() == 3, op,
                    ": q, k, v must be contiguous CPU tensors of 3 dimensions");
    STD_TORCH_CHECK(t->scalar_type() == q.scalar_type() && t->size(2) == q.size(2), op,
                    ": q, k, v must have one dtype and one head width");
  }
  STD_TORCH_CHECK(k.size(0) == v.size(0) && k.size(1) == v.size(1), op,
                  ": k and v must have one shape");
  STD_TORCH_CHECK(k.size(1) > 0 && q.size(1) % k.size(1) == 0, op,
                  ": the query heads must be a multiple of the key heads, got ", q.size(1), " and ",
                  k.size(1));
  for (const Tensor* t : {&queries, &ranges}) {
    STD_TORCH_CHECK(t->is_cpu() && t->is_contiguous() && t->scalar_type() == ScalarType::Long, op,
                    ": queries and ranges must be contiguous int64 CPU tensors");
  }
  STD_TORCH_CHECK(
      queries.dim() == 2 && queries.size(1) == 5 && ranges.dim() == 2 && ranges.size(1) == 2, op,
      ": queries must have shape (n, 5) and ranges (m, 2)");
  STD_TORCH_CHECK(window >= 0 && softcap >= 0, op, ": window and softcap must be >= 0");
}

Tensor attention(Tensor q, Tensor k, Tensor v, Tensor queries, Tensor ranges, double scale,
                 int64_t window, double softcap) {
  const char* op = "sarm_cpu::attention";
  check(op, q, k, v, queries, ranges, window, softcap);
  Tensor out = torch::stable::empty_like(q);
  if (q.numel() == 0) return out;
  switch (q.scalar_type()) {
    case ScalarType::Float:
      attend<float>(q, k, v, &out, queries, ranges, scale, window, softcap);
      break;
    case ScalarType::BFloat16:
      attend<bf16>(q, k, v, &out, queries, ranges, scale, window, softcap);
      break;
    default:
      STD_TORCH_CHECK(false, op, ": q must be float32 or bfloat16");
  }
  return out;
}

// Every (run, key head) is a task with sums of its own; they are added up in the order of the runs,
// so that no bit depends on the number of threads.
std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor q, Tensor k, Tensor v, Tensor out,
                                                      Tensor d_out, Tensor queries, Tensor ranges,
                                                      double scale, int64_t window,
                                                      double softcap) {
  const char* op = "sarm_cpu::attention_backward";
  check(op, q, k, v, queries, ranges, window, softcap);
  for (const Tensor* t : {&q, &out, &d_out}) {
    STD_TORCH_CHECK(t->is_cpu() && t->is_contiguous() && t->scalar_type() == ScalarType::Float &&
                        t->dim() == 3 && t->numel() == q.numel(),
                    op, ": q, out, d_out must be contiguous float32 CPU tensors of one shape");
  }
  Tensor d_q = torch::stable::empty_like(q), d_k = torch::stable::empty_like(k),
         d_v = torch::stable::empty_like(v);
  torch::stable::zero_(d_k);
  torch::stable::zero_(d_v);
  if (q.numel() == 0) return {d_q, d_k, d_v};
  const auto* runs = reinterpret_cast<const cpu::AttentionRun*>(queries.const_data_ptr<int64_t>());
  const auto* own = reinterpret_cast<const cpu::AttentionRange*>(ranges.const_data_ptr<int64_t>());
  const int64_t n = queries.size(0), G = k.size(1), D = q.size(2);
  check_spans(op, runs, n, own, ranges.size(0), q.size(0), k.size(0));
  const cpu::AttentionGradient problem{
      {static_cast<const float*>(q.const_data_ptr()), static_cast<const float*>(k.const_data_ptr()),
       static_cast<const float*>(v.const_data_ptr()), static_cast<float*>(out.mutable_data_ptr()),
       own, q.size(1), G, D, window, static_cast<float>(scale), static_cast<float>(softcap)},
      static_cast<const float*>(d_out.const_data_ptr()),
      static_cast<float*>(d_q.mutable_data_ptr())};
  std::vector<int64_t> offset(n + 1, 0);
  int64_t longest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t keys = runs[i].position + runs[i].count;
    longest = std::max(longest, keys);
    offset[i + 1] = offset[i] + 2 * G * keys * D;  // of every key head d_k, then d_v
  }
  std::vector<float> sums(offset[n], 0.0f);
  const int64_t count = n * G;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  const int64_t lines = cpu::attention_backward_scratch(longest, D, softcap > 0) / 16 + 1;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      std::unique_ptr<Line[]> scratch(new Line[lines]());
      for (int64_t t; (t = next.fetch_add(1)) < count;) {
        const int64_t i = t / G, g = t % G, size = (runs[i].position + runs[i].count) * D;
        float* mine = sums.data() + offset[i] + 2 * g * size;
        cpu::attend_backward(problem, runs[i], g, mine, mine + size, scratch[0].lanes);
      }
    }
  });
  float* to[2] = {static_cast<float*>(d_k.mutable_data_ptr()),
                  static_cast<float*>(d_v.mutable_data_ptr())};
  for (int64_t i = 0; i < n; ++i) {
    const int64_t keys = runs[i].position + runs[i].count;
    const float* from = sums.data() + offset[i];
    for (int64_t g = 0; g < G; ++g) {
      for (float* sum : to) {
        const cpu::AttentionRange* range = own + runs[i].range;
        int64_t passed = 0;
        for (int64_t key = 0; key < keys; ++key, from += D) {
          while (key >= passed + range->count) passed += range++->count;
          float* row = sum + ((range->first + key - passed) * G + g) * D;
          for (int64_t d = 0; d < D; ++d) row[d] += from[d];
        }
      }
    }
  }
  return {d_q, d_k, d_v};
}

}  // namespace
}  // namespace sarm

STABLE_TORCH_LIBRARY_FRAGMENT(sarm_cpu, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor queries, Tensor ranges, float scale, "
      "int window, float softcap) -> Tensor");
  m.def(
      "attention_backward(Tensor q, Tensor k, Tensor v, Tensor out, Tensor d_out, Tensor queries, "
      "Tensor ranges, float scale, int window, float softcap) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(sarm_cpu, CPU, m) {
  m.impl("attention", TORCH_BOX(&sarm::attention));
  m.impl("attention_backward", TORCH_BOX(&sarm::attention_backward));
}
