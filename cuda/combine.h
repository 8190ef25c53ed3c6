// Joins the partial results of split requests; the second half of dense decode.
#pragma once

#include "ffi.h"
#include "mla.cuh"

namespace jax_flashmla {

struct CombineParams {
  TileSchedule schedule;
  const float* o_partial;    // [2 * num_parts, h_kv, rows, d_v], each normalised
  const float* lse_partial;  // [2 * num_parts, h_kv, rows], base 2; -inf where no key was seen
  void* out;                 // [b, h_kv, rows, d_v]
  float* lse;                // [b, h_q, s_q], natural
  int batch, num_kv_heads, rows, group, s_q;
};

// `T` is the type of `out`.
template <typename T>
ffi::Error LaunchCombine(const CombineParams& params, cudaStream_t stream);

}  // namespace jax_flashmla
