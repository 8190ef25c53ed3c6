// Online softmax over tiles of scores in accumulator fragments (sm90/fragment.cuh).
//
// The idea (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, as used in
// FlashAttention): keep a reference value for each row, and weigh a score s by 2^(s - reference).
// When a score exceeds the reference, raise the reference and rescale what was summed before: the
// sums here, O in the op that holds it (dense_decode/accumulator.cuh).
//
// Here the reference is not the exact maximum. It is raised only when a score exceeds it by more
// than 8 (in base 2). Weights are then at most 2^8 instead of 1, which costs no precision in
// floating point, and most tiles need no rescaling of O.
#pragma once

#include "sm90/fragment.cuh"

namespace jax_flashmla {

constexpr float kLn2 = 0.6931471805599453f;
constexpr float kLog2e = 1.4426950408889634f;

__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The log-sum-exp as users get it: natural logarithm, +inf for a row that sees no key.
__device__ __forceinline__ float NaturalLse(float lse2) {
  return lse2 == -INFINITY ? INFINITY : lse2 * kLn2;
}

// Masks a [64 x 64] fragment of scores: sets to -inf the columns from `top` on in the row of d[4j],
// and the columns from `bottom` on in the row of d[4j+2].
__device__ __forceinline__ void MaskFrom(float (&d)[32], int top, int bottom) {
  // Relative to this thread's first column, so that constants are compared below.
  top -= sm90::FragmentColumn();
  bottom -= sm90::FragmentColumn();
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (8 * j + i >= top) d[4 * j + i] = -INFINITY;
      if (8 * j + i >= bottom) d[4 * j + 2 + i] = -INFINITY;
    }
  }
}

// Masks the columns of a [64 x 64] fragment whose bit is 0. The bits lie as loading warps set them
// (decode/block.cuh): column 16i + 4w + q is bit 4i + q of half-word w.
__device__ __forceinline__ void MaskByBits(float (&d)[32], uint2 words) {
  // Moves this thread's first column to bit 0, so that constants are compared below.
  const int shift = (threadIdx.x / 2 % 2) * 16 + (threadIdx.x % 2) * 2;
  words.x >>= shift;
  words.y >>= shift;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const uint32_t word = j % 2 == 0 ? words.x : words.y;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (word >> (j / 2 * 4 + i) & 1) continue;
      d[4 * j + i] = d[4 * j + 2 + i] = -INFINITY;
    }
  }
}

// The softmax of this thread's two rows.
class OnlineSoftmax {
 public:
  // Raises the references where a score of this tile exceeds them by too much. `factor` returns
  // what the earlier results of each row must be multiplied by.
  __device__ __forceinline__ void RaiseReferences(const float (&d)[32], float scale_log2,
                                                  float (&factor)[2]) {
    float largest[2] = {fmaxf(ChainMax(d, 0, 0), ChainMax(d, 0, 1)),
                        fmaxf(ChainMax(d, 1, 0), ChainMax(d, 1, 1))};
    factor[0] = factor[1] = 1.f;
    const bool exceeds = largest[0] * scale_log2 > reference_[0] + kLag ||
                         largest[1] * scale_log2 > reference_[1] + kLag;
    // For most tiles this thread's own columns show that no reference must be raised.
    if (!__any_sync(sm90::kFullWarp, exceeds)) return;
    sm90::QuadMax(largest);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float scaled = largest[r] * scale_log2;
      // True at the first key as well, because -inf + kLag is -inf.
      if (!(scaled > reference_[r] + kLag)) continue;
      factor[r] = Exp2(reference_[r] - scaled);
      sum_[r] *= factor[r];
      reference_[r] = scaled;
    }
  }

  // Turns the scores of columns 16k .. 16k+15 into weights.
  __device__ __forceinline__ void Exponentiate(float (&d)[32], float scale_log2, int k) {
    const float subtract[2] = {Finite(reference_[0]), Finite(reference_[1])};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& x = d[8 * k + i];
      x = Exp2(fmaf(x, scale_log2, -subtract[i / 2 % 2]));
      sum_[i / 2 % 2] += x;
    }
  }

  // `factor` returns what O must be multiplied by to normalise it. `lse2` returns the base-2
  // logarithm of the sum of the exponentials of the scaled scores, -inf if a row saw no key.
  __device__ __forceinline__ void Finish(float (&factor)[2], float (&lse2)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = sm90::QuadSum(sum_[r]);
      factor[r] = sum == 0.f ? 0.f : 1.f / sum;
      lse2[r] = sum == 0.f ? -INFINITY : log2f(sum) + reference_[r];
    }
  }

 private:
  static constexpr float kLag = 8.f;

  // The reference is -inf before the first key, and -inf - -inf would be NaN.
  __device__ __forceinline__ static float Finite(float reference) {
    return reference == -INFINITY ? 0.f : reference;
  }
  // The maximum of every other pair of columns of row `r`. Two such chains run side by side.
  __device__ __forceinline__ static float ChainMax(const float (&d)[32], int r, int part) {
    float x = fmaxf(d[4 * part + 2 * r], d[4 * part + 2 * r + 1]);
#pragma unroll
    for (int j = part + 2; j < 8; j += 2) {
      x = fmaxf(x, fmaxf(d[4 * j + 2 * r], d[4 * j + 2 * r + 1]));
    }
    return x;
  }

  float reference_[2] = {-INFINITY, -INFINITY};  // in base 2, scaled
  float sum_[2] = {0.f, 0.f};                    // over this thread's columns
};

}  // namespace jax_flashmla
