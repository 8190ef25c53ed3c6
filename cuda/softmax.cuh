// Online softmax over tiles of scores held in accumulator fragments (sm90/fragment.cuh): Milakov
// and Gimelshein, "Online normalizer calculation for softmax" (2018), as in FlashAttention, with
// the running maximum allowed to lag behind: a row's reference value is raised only when a score
// exceeds it by 8 in base 2. P then lies below 2^8 instead of 1, which costs no precision in
// floating point, and most tiles leave the accumulators as they are.
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

// The public convention: natural logarithm, +inf for a row that sees no key.
__device__ __forceinline__ float NaturalLse(float lse2) {
  return lse2 == -INFINITY ? INFINITY : lse2 * kLn2;
}

// Sets to -inf the scores of a [64 x 64] fragment at columns `top` and on (rows of d[4j]) and at
// columns `bottom` and on (rows of d[4j+2]).
__device__ __forceinline__ void MaskFrom(float (&d)[32], int top, int bottom) {
  const int column = sm90::FragmentColumn();
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (8 * j + i + column >= top) d[4 * j + i] = -INFINITY;
      if (8 * j + i + column >= bottom) d[4 * j + 2 + i] = -INFINITY;
    }
  }
}

// The state of this thread's two rows.
class OnlineSoftmax {
 public:
  // Turns scores into weights relative to the row's reference; `factor` is what earlier results
  // of the row must be multiplied with.
  __device__ __forceinline__ void Update(float (&d)[32], float scale_log2, float (&factor)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float largest = d[2 * r];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        largest = fmaxf(largest, fmaxf(d[4 * j + 2 * r], d[4 * j + 2 * r + 1]));
      }
      largest = sm90::QuadMax(largest) * scale_log2;
      factor[r] = 1.f;
      if (largest > reference_[r] + kLag) {  // also at the first key: -inf + kLag is -inf
        factor[r] = Exp2(reference_[r] - largest);
        reference_[r] = largest;
      }
      const float subtract = reference_[r] == -INFINITY ? 0.f : reference_[r];
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = d[4 * j + 2 * r + i];
          x = Exp2(fmaf(x, scale_log2, -subtract));
          sum += x;
        }
      }
      sum_[r] = fmaf(sum_[r], factor[r], sum);
    }
  }

  // `factor` normalises the rows; `lse2` is the base-2 log of the sum of the exponentials of the
  // scaled scores, -inf where there was no key.
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
  float reference_[2] = {-INFINITY, -INFINITY};  // in base 2, scaled
  float sum_[2] = {0.f, 0.f};                    // of this thread's columns
};

}  // namespace jax_flashmla
