// The partial results of split sequences: what a block leaves for another block of its own launch,
// or for the combine kernel.
//
// Elements are fp16, scaled by a power of 2 for each quarter of a row so that the largest element
// is near the end of fp16's range (mla/epilogue.cuh). That moves half the bytes of float32. An
// element loses at most 2^-11 of itself or, if it is tiny, 2^-39 of the largest one: less than
// rounding the result to bf16 loses, and as much as rounding it to fp16.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "mla/shapes.cuh"

namespace jax_flashmla::split_kv {

// Where the partial result of a split is stored. A part shares at most two sequences with other
// parts, so it has two places: 2 * part + 1 for the first split of a sequence (the part ends in
// that sequence), 2 * part for a later split (the part begins in it).
__host__ __device__ constexpr int PartialIndex(int part, bool is_first_split) {
  return 2 * part + (is_first_split ? 1 : 0);
}
constexpr int kPartialsPerPart = 2;

struct PartialResults {
  __half* o;     // [2 * num_parts, h_kv, rows, d_v], to be multiplied by `scale`
  float* scale;  // [2 * num_parts, h_kv, 4, rows], one for each quarter of a row: powers of 2
  float* lse;    // [2 * num_parts, h_kv, rows], base 2; -inf where no key was seen

  // A row of them. ScaleRow() points to the scale of a row's first quarter; the scales of its other
  // quarters are `query.rows` elements apart.
  __device__ __forceinline__ __half* ORow(const QueryShape& query, int index, int kv_head,
                                          int row) const {
    return o + query.Row(index, kv_head, row) * kHeadDimV;
  }
  __device__ __forceinline__ float* ScaleRow(const QueryShape& query, int index, int kv_head,
                                             int row) const {
    return scale + (query.Row(index, kv_head, 0) * kQuarters + row);
  }
  __device__ __forceinline__ float* LseRow(const QueryShape& query, int index, int kv_head,
                                           int row) const {
    return lse + query.Row(index, kv_head, row);
  }
};

}  // namespace jax_flashmla::split_kv
