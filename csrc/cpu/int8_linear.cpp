// The product of quantised rows and quantised weights, with scales, bias and residual added while
// the sums are in cache. Weights come as they are stored, (O, D), and are packed panel by panel on
// the way: that costs as much as multiplying 8 rows, and no backend has a format of its own.
#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/int8.h"
#include "cpu/int8_tile.h"

namespace sarm::cpu {
namespace {

// Panels packed at once: they and the rows of a tile stay in L2 (1 to 2 MiB on servers).
constexpr int64_t kPackedBytes = 1 << 20;

template <class Out>
struct Epilogue {
  // Row n, columns [o, o + width) from their sums.
  SARM_INLINE static void run(const Int8Linear<Out>& p, const int32_t* __restrict sums, int64_t n,
                              int64_t o, int64_t width) {
    float row[kPanel];
    const float scale = p.scale[n];
    const float* __restrict w_scale = p.w_scale + o;
    Out* __restrict out = p.out + n * p.O + o;
    for (int64_t c = 0; c < width; ++c) row[c] = static_cast<float>(sums[c]) * scale * w_scale[c];
    end_pass();
    if (p.bias != nullptr) {
      for (int64_t c = 0; c < width; ++c) row[c] += p.bias[o + c];
    }
    if (p.residual != nullptr) {
      const float* __restrict residual = p.residual + n * p.O + o;
      for (int64_t c = 0; c < width; ++c) row[c] += residual[c];
    }
    for (int64_t c = 0; c < width; ++c) store(row[c], out + c);
  }
};

template <class Out>
struct EpilogueRows {
  SARM_INLINE static void run(const Int8Linear<Out>& p, const int32_t* sums, int64_t n, int64_t R,
                              int64_t o) {
    const int64_t width = std::min(kPanel, p.O - o);
    for (int64_t r = 0; r < R; ++r) {
      // a constant width where it can be: 4 vectors instead of a loop with a tail
      if (width == kPanel) {
        Epilogue<Out>::run(p, sums + r * kPanel, n + r, o, kPanel);
      } else {
        Epilogue<Out>::run(p, sums + r * kPanel, n + r, o, width);
      }
    }
  }
};

template <class Level>
void tile(int64_t R, const int8_t* q, int64_t D, const typename Level::Weight* panel,
          const int32_t* start, int32_t* sums) {
  static_assert(kTileRows == 6);
  switch (R) {
    case 1:
      return Level::template tile<1>(q, D, panel, start, sums);
    case 2:
      return Level::template tile<2>(q, D, panel, start, sums);
    case 3:
      return Level::template tile<3>(q, D, panel, start, sums);
    case 4:
      return Level::template tile<4>(q, D, panel, start, sums);
    case 5:
      return Level::template tile<5>(q, D, panel, start, sums);
    default:
      return Level::template tile<6>(q, D, panel, start, sums);
  }
}

template <class Level, class Out>
void multiply(const Int8Linear<Out>& p, int64_t row_begin, int64_t row_end, int64_t panel_begin,
              int64_t panel_end) {
  using Weight = typename Level::Weight;
  const int64_t padded = (p.D + Level::kStep - 1) / Level::kStep * Level::kStep;
  const int64_t panel_size = std::max<int64_t>(1, padded * kPanel);
  const int64_t fit = kPackedBytes / (panel_size * static_cast<int64_t>(sizeof(Weight)));
  const int64_t most = std::clamp<int64_t>(fit, 1, panel_end - panel_begin);
  const std::unique_ptr<Weight[]> packed(new Weight[most * panel_size]);
  std::vector<int32_t> start(row_end - row_begin);
  Level::prepare(p.q + row_begin * p.D, row_end - row_begin, p.D, start.data());
  alignas(64) int32_t sums[kTileRows * kPanel];
  std::vector<int8_t> ragged(padded == p.D ? 0 : kTileRows * padded);
  for (int64_t first = panel_begin; first < panel_end; first += most) {
    const int64_t count = std::min(most, panel_end - first);
    for (int64_t t = 0; t < count; ++t) {
      const int64_t o = (first + t) * kPanel;
      Level::pack(p.w + o * p.D, std::min(kPanel, p.O - o), p.D, packed.get() + t * panel_size);
    }
    for (int64_t n = row_begin; n < row_end; n += kTileRows) {
      const int64_t R = std::min<int64_t>(kTileRows, row_end - n);
      const int8_t* q = p.q + n * p.D;
      if (padded != p.D) {
        for (int64_t r = 0; r < R; ++r) std::copy_n(q + r * p.D, p.D, ragged.data() + r * padded);
        q = ragged.data();
      }
      for (int64_t t = 0; t < count; ++t) {
        tile<Level>(R, q, padded, packed.get() + t * panel_size, start.data() + (n - row_begin),
                    sums);
        run_widest<EpilogueRows<Out>, const Int8Linear<Out>&>(p, sums, n, R, (first + t) * kPanel);
      }
    }
  }
}

}  // namespace

template <class Out>
void int8_linear(const Int8Linear<Out>& p, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                 int64_t panel_end) {
  if (row_begin >= row_end || panel_begin >= panel_end) return;
#ifdef SARM_X86_64
  if (Vnni::supported()) {
    return multiply<Vnni>(p, row_begin, row_end, panel_begin, panel_end);
  }
  if (simd_level() != Simd::portable) {
    return multiply<Avx2>(p, row_begin, row_end, panel_begin, panel_end);
  }
#endif
  multiply<Portable>(p, row_begin, row_end, panel_begin, panel_end);
}

template void int8_linear(const Int8Linear<float>&, int64_t, int64_t, int64_t, int64_t);
template void int8_linear(const Int8Linear<bf16>&, int64_t, int64_t, int64_t, int64_t);

}  // namespace sarm::cpu
