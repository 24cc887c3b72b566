// The only file that sees torch: checks arguments, splits rows over threads, calls the kernels.
// LibTorch stable ABI (target 2.10), so one binary serves every later torch and every Python.
//
// The ops live in the private namespace sarm_cpu; the public ops of the namespace sarm, with
// fake kernels and autograd, are Python (sarm/ops) and choose a backend per call. Everything is
// validated before parallel_for: an exception thrown inside loses its text at target 2.10.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <vector>

#include "common/pages.h"
#include "cpu/kernels.h"

namespace sarm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrainFlops = 1 << 16;  // below about 10 us of work a thread is not worth waking

void check_matrix(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2 && t.is_contiguous(), op, ": ", name,
                  " must be a contiguous matrix on the CPU");
}

void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType dtype) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": ", name, " has the wrong dtype");
}

void check_same_size(const char* op, const char* what, int64_t a, int64_t b) {
  STD_TORCH_CHECK(a == b, op, ": ", what, " differ, ", a, " and ", b);
}

// coef (N, K) fp32 and idx (N, K) int64 with every index in [0, L).
void check_latents(const char* op, const Tensor* coef, const Tensor& idx, int64_t L) {
  check_matrix(op, "idx", idx);
  check_dtype(op, "idx", idx, ScalarType::Long);
  if (coef != nullptr) {
    check_matrix(op, "vals", *coef);
    check_dtype(op, "vals", *coef, ScalarType::Float);
    check_same_size(op, "rows of vals and idx", coef->size(0), idx.size(0));
    check_same_size(op, "columns of vals and idx", coef->size(1), idx.size(1));
  }
  const int64_t* i = idx.const_data_ptr<int64_t>();
  int64_t low = 0, high = -1;
  for (int64_t e = 0; e < idx.numel(); ++e) {
    low = std::min(low, i[e]);
    high = std::max(high, i[e]);
  }
  STD_TORCH_CHECK(low >= 0 && high < L, op, ": idx must be in [0, n_latents=", L, "), got ",
                  low < 0 ? low : high);
}

int64_t grain(int64_t flops_per_row) {
  return std::max<int64_t>(1, kGrainFlops / std::max<int64_t>(1, flops_per_row));
}

const bf16* bf16_data(const Tensor& t) { return static_cast<const bf16*>(t.const_data_ptr()); }

#define SARM_CHECK_FLOAT_OR_BF16(op, name, t)                                                  \
  STD_TORCH_CHECK(                                                                             \
      (t).scalar_type() == ScalarType::Float || (t).scalar_type() == ScalarType::BFloat16, op, \
      ": ", name, " must be float32 or bfloat16")

Tensor sparse_value(Tensor vals, Tensor idx, Tensor w_head) {
  const char* op = "sarm_cpu::sparse_value";
  check_matrix(op, "w_head", w_head);
  SARM_CHECK_FLOAT_OR_BF16(op, "w_head", w_head);
  check_latents(op, &vals, idx, w_head.size(1));
  const int64_t N = idx.size(0), K = idx.size(1), P = w_head.size(0), L = w_head.size(1);
  Tensor out = torch::stable::new_empty(vals, {N, P});
  const float* v = vals.const_data_ptr<float>();
  const int64_t* i = idx.const_data_ptr<int64_t>();
  float* o = out.mutable_data_ptr<float>();
  const bool wide = w_head.scalar_type() == ScalarType::Float;
  torch::stable::parallel_for(0, N, grain(2 * K * P), [&](int64_t begin, int64_t end) {
    if (wide) {
      cpu::sparse_value(v, i, w_head.const_data_ptr<float>(), o, begin, end, K, L, P);
    } else {
      cpu::sparse_value(v, i, bf16_data(w_head), o, begin, end, K, L, P);
    }
  });
  return out;
}

Tensor gather_dot(Tensor y, Tensor idx, Tensor w) {
  const char* op = "sarm_cpu::gather_dot";
  check_matrix(op, "y", y);
  check_matrix(op, "w", w);
  SARM_CHECK_FLOAT_OR_BF16(op, "w", w);
  check_dtype(op, "y", y, w.scalar_type());
  check_latents(op, nullptr, idx, w.size(0));
  check_same_size(op, "rows of y and idx", y.size(0), idx.size(0));
  check_same_size(op, "columns of y and w", y.size(1), w.size(1));
  const int64_t N = idx.size(0), K = idx.size(1), D = w.size(1);
  Tensor out = torch::stable::new_empty(y, {N, K}, ScalarType::Float);
  const int64_t* i = idx.const_data_ptr<int64_t>();
  float* o = out.mutable_data_ptr<float>();
  const bool wide = w.scalar_type() == ScalarType::Float;
  torch::stable::parallel_for(0, N, grain(2 * K * D), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(D);
    if (wide) {
      cpu::gather_dot(y.const_data_ptr<float>(), i, w.const_data_ptr<float>(), o, scratch.data(),
                      begin, end, K, D);
    } else {
      cpu::gather_dot(bf16_data(y), i, bf16_data(w), o, scratch.data(), begin, end, K, D);
    }
  });
  return out;
}

Tensor gather_sum(Tensor vals, Tensor idx, Tensor w) {
  const char* op = "sarm_cpu::gather_sum";
  check_matrix(op, "w", w);
  SARM_CHECK_FLOAT_OR_BF16(op, "w", w);
  check_latents(op, &vals, idx, w.size(0));
  const int64_t N = idx.size(0), K = idx.size(1), D = w.size(1);
  Tensor out = torch::stable::new_empty(w, {N, D});
  std::vector<int64_t> offset(N + 1);
  for (int64_t n = 0; n <= N; ++n) offset[n] = n * K;
  const float* v = vals.const_data_ptr<float>();
  const int64_t* i = idx.const_data_ptr<int64_t>();
  const bool wide = w.scalar_type() == ScalarType::Float;
  torch::stable::parallel_for(0, N, grain(2 * K * D), [&](int64_t begin, int64_t end) {
    if (wide) {
      cpu::segment_sum(v, i, offset.data(), w.const_data_ptr<float>(),
                       out.mutable_data_ptr<float>(), begin, end, D);
    } else {
      cpu::segment_sum(v, i, offset.data(), bf16_data(w),
                       static_cast<bf16*>(out.mutable_data_ptr()), begin, end, D);
    }
  });
  return out;
}

Tensor scatter_outer(Tensor a, Tensor idx, Tensor y, int64_t n_latents, bool narrow) {
  const char* op = "sarm_cpu::scatter_outer";
  check_matrix(op, "y", y);
  SARM_CHECK_FLOAT_OR_BF16(op, "y", y);
  check_latents(op, &a, idx, n_latents);
  check_same_size(op, "rows of y and idx", y.size(0), idx.size(0));
  const int64_t N = idx.size(0), K = idx.size(1), D = y.size(1), L = n_latents;
  STD_TORCH_CHECK(!narrow || y.scalar_type() == ScalarType::BFloat16, op,
                  ": a bfloat16 result needs a bfloat16 y");
  Tensor out =
      torch::stable::new_empty(y, {L, D}, narrow ? ScalarType::BFloat16 : ScalarType::Float);
  advise_huge_pages(out.mutable_data_ptr(), out.numel() * (narrow ? 2 : 4));
  std::vector<float> coef(N * K);
  std::vector<int64_t> row(N * K), offset(L + 1);
  cpu::group_by_latent(a.const_data_ptr<float>(), idx.const_data_ptr<int64_t>(), N, K, L,
                       coef.data(), row.data(), offset.data());
  // Popular latents own most entries, so equal shares of latents are unequal work. Cut where
  // entries + latents (the zero rows cost a write) pass equal shares; a latent is never split,
  // hence the sum's order does not depend on the number of threads.
  const int64_t tasks = std::min<int64_t>(L, 8 * torch::stable::get_num_threads());
  std::vector<int64_t> cut(tasks + 1, L);
  for (int64_t l = 0, t = 0; t < tasks; ++t) {
    while (l < L && offset[l] + l < (N * K + L) / tasks * t) ++l;
    cut[t] = l;
  }
  const bool wide = y.scalar_type() == ScalarType::Float;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    if (wide) {
      cpu::segment_sum(coef.data(), row.data(), offset.data(), y.const_data_ptr<float>(),
                       out.mutable_data_ptr<float>(), cut[begin], cut[end], D);
    } else if (narrow) {
      cpu::segment_sum(coef.data(), row.data(), offset.data(), bf16_data(y),
                       static_cast<bf16*>(out.mutable_data_ptr()), cut[begin], cut[end], D);
    } else {
      cpu::segment_sum(coef.data(), row.data(), offset.data(), bf16_data(y),
                       out.mutable_data_ptr<float>(), cut[begin], cut[end], D);
    }
  });
  return out;
}

}  // namespace
}  // namespace sarm

STABLE_TORCH_LIBRARY(sarm_cpu, m) {
  m.def("sparse_value(Tensor vals, Tensor idx, Tensor w_head) -> Tensor");
  m.def("gather_dot(Tensor y, Tensor idx, Tensor w) -> Tensor");
  m.def("gather_sum(Tensor vals, Tensor idx, Tensor w) -> Tensor");
  m.def("scatter_outer(Tensor a, Tensor idx, Tensor y, int n_latents, bool narrow) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sarm_cpu, CPU, m) {
  m.impl("sparse_value", TORCH_BOX(&sarm::sparse_value));
  m.impl("gather_dot", TORCH_BOX(&sarm::gather_dot));
  m.impl("gather_sum", TORCH_BOX(&sarm::gather_sum));
  m.impl("scatter_outer", TORCH_BOX(&sarm::scatter_outer));
}

// An empty module: importing it runs the registrations above.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
