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
  // From this thread's first column on: a number to compare constants with.
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

// The state of this thread's two rows.
class OnlineSoftmax {
 public:
  // Makes room for the scores of a tile: raises a row's reference if a score exceeds it by too
  // much. `factor` is what earlier results of the row must be multiplied with.
  __device__ __forceinline__ void Raise(const float (&d)[32], float scale_log2,
                                        float (&factor)[2]) {
    float largest[2] = {fmaxf(PartMax(d, 0, 0), PartMax(d, 0, 1)),
                        fmaxf(PartMax(d, 1, 0), PartMax(d, 1, 1))};
    factor[0] = factor[1] = 1.f;
    const bool exceeds = largest[0] * scale_log2 > reference_[0] + kLag ||
                         largest[1] * scale_log2 > reference_[1] + kLag;
    // Most tiles need no maximum over the whole row.
    if (!__any_sync(sm90::kFullWarp, exceeds)) return;
    sm90::QuadMax(largest);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float scaled = largest[r] * scale_log2;
      // Also at the first key: -inf + kLag is -inf.
      if (!(scaled > reference_[r] + kLag)) continue;
      factor[r] = Exp2(reference_[r] - scaled);
      sum_[r] *= factor[r];
      reference_[r] = scaled;
    }
  }

  // Turns the scores of columns 16k .. 16k + 15 into weights relative to the references.
  __device__ __forceinline__ void Exponentiate(float (&d)[32], float scale_log2, int k) {
    const float subtract[2] = {Finite(reference_[0]), Finite(reference_[1])};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& x = d[8 * k + i];
      x = Exp2(fmaf(x, scale_log2, -subtract[i / 2 % 2]));
      sum_[i / 2 % 2] += x;
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

  // A row that has seen no key yet has -inf, and -inf - -inf is NaN.
  __device__ __forceinline__ static float Finite(float reference) {
    return reference == -INFINITY ? 0.f : reference;
  }
  // The maximum of every other pair of columns of row `r`, in a chain of its own.
  __device__ __forceinline__ static float PartMax(const float (&d)[32], int r, int part) {
    float x = fmaxf(d[4 * part + 2 * r], d[4 * part + 2 * r + 1]);
#pragma unroll
    for (int j = part + 2; j < 8; j += 2) {
      x = fmaxf(x, fmaxf(d[4 * j + 2 * r], d[4 * j + 2 * r + 1]));
    }
    return x;
  }

  float reference_[2] = {-INFINITY, -INFINITY};  // in base 2, scaled
  float sum_[2] = {0.f, 0.f};                    // of this thread's columns
};

}  // namespace jax_flashmla
