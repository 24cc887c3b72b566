// Every 16-bit number is widened exactly, one by one and in lanes; fp32 is rounded to bf16 to the
// nearest, ties to even; keys order floats as the contract of topk_encode says.
#include <algorithm>
#include <vector>

#include "check.h"
#include "cpu/lanes.h"
#include "cpu/topk_key.h"

namespace check {
namespace {

template <class T>
void widen_all() {
  constexpr int64_t kAll = 1 << 16;
  Exact<T> all(kAll);
  for (int64_t i = 0; i < kAll; ++i) all[i].bits = static_cast<uint16_t>(i);
  for (int64_t i = 0; i < kAll; i += sarm::cpu::kLanes) {
    sarm::cpu::Lanes lanes;
    sarm::cpu::load_lanes(all.data() + i, &lanes);
    for (int64_t t = 0; t < sarm::cpu::kLanes; ++t) {
      const double expected = decode(all[i + t]);
      if (!same(sarm::to_float(all[i + t]), expected)) fail("to_float of %#x", all[i + t].bits);
      if (!same(lanes[t], expected)) fail("load_lanes of %#x", all[i + t].bits);
      if (std::signbit(sarm::to_float(all[i + t])) != (all[i + t].bits >> 15 != 0)) {
        fail("sign of %#x", all[i + t].bits);
      }
    }
  }
}

// Around every midpoint between two bf16 neighbours: below, on and above it.
void round_to_bf16() {
  for (uint32_t high = 0; high < 1u << 16; ++high) {
    for (const uint32_t low : {0u, 1u, 0x7FFFu, 0x8000u, 0x8001u, 0xFFFFu}) {
      const uint32_t bits = high << 16 | low;
      float v;
      std::memcpy(&v, &bits, sizeof(v));
      sarm::bf16 got;
      sarm::store(v, &got);
      if (v != v) {
        if (!std::isnan(decode(got))) fail("bf16 of NaN %#x is %#x", bits, got.bits);
        continue;
      }
      const uint32_t odd = high & 1u;
      const uint32_t up = low > 0x8000u || (low == 0x8000u && odd != 0) ? 1u : 0u;
      if (got.bits != high + up) fail("bf16 of %#x is %#x", bits, got.bits);
    }
  }
}

void keys() {
  std::vector<float> values = {kNan,  -kNan, kInf,   -kInf, 0.0f,    -0.0f,
                               1.0f,  -1.0f, 1e-45f, 2.0f,  -1e-45f, std::nextafter(1.0f, 2.0f),
                               3e38f, -3e38f};
  Draw draw(1);
  for (int i = 0; i < 50; ++i) values.push_back(static_cast<float>(draw.normal()));
  const auto better = [](float a, uint32_t i, float b, uint32_t j) {
    if (a != a || b != b) return (a != a) != (b != b) ? a != a : i < j;
    return a != b ? a > b : i < j;
  };
  const uint32_t indices[] = {0, 1, 77, 0xFFFFFFFFu};
  for (const float a : values) {
    for (const float b : values) {
      for (const uint32_t i : indices) {
        const uint64_t key = sarm::cpu::make_key(a, i);
        if (sarm::cpu::key_index(key) != i) fail("index %u of a key", i);
        if (!same(sarm::cpu::key_value(key), a)) fail("value %g of a key", a);
        for (const uint32_t j : indices) {
          if ((key > sarm::cpu::make_key(b, j)) != better(a, i, b, j)) {
            fail("keys of (%g, %u) and (%g, %u)", a, i, b, j);
          }
        }
      }
    }
  }
}

}  // namespace

void numbers() {
  widen_all<sarm::bf16>();
  widen_all<sarm::fp16>();
  round_to_bf16();
  keys();
}

}  // namespace check
