// Selection of the K largest of a block's keys, by all threads of the block. CUB has block-wide
// sorts, but they run on a device only; these also run in the emulator.
//
// A key orders candidates as the contract does, so that nothing below has a special case: the
// value's order in the high half, the complement of the latent's index in the low half. Keys are
// distinct, because indices are.
#pragma once

#include "cuda/platform.h"

namespace sarm::cuda {

constexpr int kSelectThreads = 256;
constexpr uint32_t kNanOrder = 0xFFFFFFFFu;  // NaN of either sign ranks highest

// A larger value has a larger order; -0 and +0 are equal. No value has the order 0.
__device__ __forceinline__ uint32_t value_order(float v) {
  if (v != v) return kNanOrder;
  const uint32_t bits = __float_as_uint(v == 0.0f ? 0.0f : v);
  return bits ^ ((bits >> 31) != 0 ? 0xFFFFFFFFu : 0x80000000u);
}

__device__ __forceinline__ float order_value(uint32_t order) {
  if (order == kNanOrder) return __uint_as_float(0x7FC00000u);
  return __uint_as_float((order >> 31) != 0 ? order ^ 0x80000000u : ~order);
}

__device__ __forceinline__ uint64_t make_key(uint32_t order, uint32_t index) {
  return (static_cast<uint64_t>(order) << 32) | (0xFFFFFFFFu - index);
}

__device__ __forceinline__ uint32_t key_order(uint64_t key) {
  return static_cast<uint32_t>(key >> 32);
}

__device__ __forceinline__ uint32_t key_index(uint64_t key) {
  return 0xFFFFFFFFu - static_cast<uint32_t>(key);
}

// What the threads of a block share while they select.
struct SelectState {
  int count;       // candidates
  uint32_t bound;  // order of the worst of K kept candidates
  uint32_t bin[kSelectThreads];
  uint32_t differ[2];    // bits in which some keys differ, low and high half
  unsigned digit, need;  // the bin that holds the K-th key, and how many keys it gives
  bool whole;            // it gives all that it holds
};

// Adds one warp's candidates to keys; returns where they end. The order of warps is left to the
// schedule: every later step sorts or compares keys, and does not care.
__device__ __forceinline__ int append(uint64_t* keys, SelectState& s, bool keep, uint64_t key) {
  const unsigned lane = threadIdx.x % kWarp;
  const unsigned kept = __ballot_sync(kFullMask, keep);
  if (kept == 0) return 0;
  int base = 0;
  if (lane == 0) base = atomicAdd(&s.count, __popc(kept));
  base = __shfl_sync(kFullMask, base, 0);
  if (keep) keys[base + __popc(kept & ((1u << lane) - 1))] = key;
  return base + __popc(kept);
}

// Bits that all n >= 2 keys share, from the top. Keys that passed one bound share many; skipping
// them saves passes, and spreads the first digit over the bins.
__device__ __forceinline__ int shared_bits(const uint64_t* keys, int n, SelectState& s) {
  const uint64_t pattern = keys[0];
  uint64_t differ = 0;
  for (int i = threadIdx.x; i < n; i += kSelectThreads) differ |= keys[i] ^ pattern;
  const unsigned low = __reduce_or_sync(kFullMask, static_cast<unsigned>(differ));
  const unsigned high = __reduce_or_sync(kFullMask, static_cast<unsigned>(differ >> 32));
  if (threadIdx.x < 2) s.differ[threadIdx.x] = 0;
  __syncthreads();
  if (threadIdx.x % kWarp == 0) {
    atomicOr(&s.differ[0], low);
    atomicOr(&s.differ[1], high);
  }
  __syncthreads();
  return __clzll((static_cast<uint64_t>(s.differ[1]) << 32) | s.differ[0]);
}

// Finds mask and prefix such that exactly K of n > K keys have (key & mask) >= prefix: a radix
// select, eight bits a pass, from the first bit in which keys differ.
__device__ inline void find_prefix(const uint64_t* keys, int n, int K, SelectState& s,
                                   uint64_t& mask, uint64_t& prefix) {
  const int same = shared_bits(keys, n, s);
  mask = same == 0 ? 0 : ~uint64_t{0} << (64 - same);
  prefix = keys[0] & mask;
  unsigned need = K;
#pragma unroll 1
  for (int shift = max(0, 56 - same);; shift = max(0, shift - 8)) {
    s.bin[threadIdx.x] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += kSelectThreads) {
      const uint64_t key = keys[i];
      if ((key & mask) == prefix) atomicAdd(&s.bin[(key >> shift) & 255], 1u);
    }
    __syncthreads();
    if (threadIdx.x < kWarp) {
      // Lane 0 has the eight highest bins. `before` counts the keys above this lane's bins.
      const int top = 255 - 8 * static_cast<int>(threadIdx.x);
      unsigned sum = 0;
      for (int b = 0; b < 8; ++b) sum += s.bin[top - b];
      unsigned before = sum;
      for (int step = 1; step < kWarp; step *= 2) {
        const unsigned other = __shfl_up_sync(kFullMask, before, step);
        if (static_cast<int>(threadIdx.x) >= step) before += other;
      }
      before -= sum;
      for (int b = 0; b < 8; ++b) {
        const unsigned size = s.bin[top - b];
        if (before < need && need <= before + size) {
          s.digit = top - b;
          s.need = need - before;
          s.whole = need == before + size;
        }
        before += size;
      }
    }
    __syncthreads();
    mask |= uint64_t{255} << shift;
    prefix = (prefix & ~(uint64_t{255} << shift)) | (static_cast<uint64_t>(s.digit) << shift);
    need = s.need;
    if (s.whole) return;  // at shift 0 a bin holds one key, so the loop ends here at the latest
  }
}

// Moves the K largest of s.count > K keys to the front, in no order; sets s.count and s.bound.
__device__ inline void keep_best(uint64_t* keys, int K, SelectState& s) {
  const int n = s.count;
  uint64_t mask, prefix;
  find_prefix(keys, n, K, s, mask, prefix);
  if (threadIdx.x == 0) {
    s.count = 0;
    s.bound = kNanOrder;
  }
  uint32_t worst = kNanOrder;
  for (int start = 0; start < n; start += kSelectThreads) {
    const int i = start + threadIdx.x;
    const uint64_t key = i < n ? keys[i] : 0;
    const bool keep = i < n && (key & mask) >= prefix;
    if (keep) worst = min(worst, key_order(key));
    // A kept key moves to the front, where another thread's key may still be waiting to be read.
    __syncthreads();
    append(keys, s, keep, key);
  }
  worst = __reduce_min_sync(kFullMask, worst);
  if (threadIdx.x % kWarp == 0) atomicMin(&s.bound, worst);
  __syncthreads();
}

// Sorts n keys, largest first. Bitonic, with each merge's first step mirrored: then every step puts
// the larger key in front, and the keys missing to a power of two need not exist.
__device__ inline void sort_descending(uint64_t* keys, int n) {
  for (int size = 2; size / 2 < n; size *= 2) {
    for (int step = size; step > 1; step /= 2) {
      for (int pair = threadIdx.x;; pair += kSelectThreads) {
        const int half = step / 2, block = pair / half * step, offset = pair % half;
        const int i = block + offset;
        if (i >= n) break;
        const int j = step == size ? block + step - 1 - offset : i + half;
        if (j < n && keys[i] < keys[j]) {
          const uint64_t key = keys[i];
          keys[i] = keys[j];
          keys[j] = key;
        }
      }
      __syncthreads();
    }
  }
}

}  // namespace sarm::cuda
