// The partial results of split requests: what decode leaves for another block of its own launch or
// for the combine kernel.
//
// The elements have 16 bits (fp16), relative to the largest one of their quarter of a row: that is
// half of what float32 would move. What is lost, 2^-12 of an element or 2^-40 of that largest one,
// is less than what rounding the result to bf16 loses, and as much as rounding it to fp16 does.
// Within each group of 32 columns they stand as the lanes of a quad hold them in an accumulator
// fragment (sm90/fragment.cuh): lane q has columns 8g + 2q and the next for g = 0 .. 3, in 16
// bytes.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "mla/shapes.cuh"

namespace jax_flashmla {

constexpr int kQuarters = 4;  // of a row of O
constexpr int kQuarterColumns = kHeadDimV / kQuarters;

struct PartialResults {
  __half* o;     // [2 * num_parts, h_kv, rows, d_v], to be multiplied with
  float* scale;  // [2 * num_parts, h_kv, 4, rows], of a row's quarters: powers of 2
  float* lse;    // [2 * num_parts, h_kv, rows], base 2; -inf where no key was seen
};

// Where a split's partial result lies in the workspace. A part shares at most two requests with
// other parts: the one that it ends with, if it makes the first split of it, and the one that it
// begins with.
__host__ __device__ constexpr int PartialSlot(int part, bool first_split) {
  return 2 * part + (first_split ? 1 : 0);
}

// A row of [2 * num_parts, h_kv, rows], and a quarter of it in [2 * num_parts, h_kv, 4, rows].
template <typename Params>
__device__ __forceinline__ int64_t PartialRow(const Params& params, int slot, int kv_head,
                                              int row) {
  return (static_cast<int64_t>(slot) * params.num_kv_heads + kv_head) * params.rows + row;
}
template <typename Params>
__device__ __forceinline__ int64_t PartialQuarter(const Params& params, int slot, int kv_head,
                                                  int row, int quarter) {
  return PartialRow(params, slot, kv_head, 0) * kQuarters + quarter * params.rows + row;
}

// Powers of 2 that bring elements of up to `largest` close below the end of fp16's range, from
// where 2^29 of it lie above the subnormal numbers, and back again.
struct HalfScale {
  float forth, back;

  __device__ __forceinline__ explicit HalfScale(float largest) {
    // 2^14 <= scaled < 2^15, as far as both are normal numbers.
    const uint32_t exponent = max(__float_as_uint(largest) >> 23, 15u);  // biased by 127
    forth = __uint_as_float((127 + 14 + 127 - exponent) << 23);
    back = __uint_as_float((exponent - 14) << 23);
  }
};

}  // namespace jax_flashmla
