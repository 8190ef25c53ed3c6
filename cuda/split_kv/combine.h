// Joins the partial results of requests of more splits than decode joins itself.
#pragma once

#include "host/ffi.h"
#include "split_kv/partial_result.cuh"
#include "split_kv/schedule.cuh"

namespace jax_flashmla {

struct CombineParams {
  TileSchedule schedule;
  PartialResults partial;
  void* out;   // [b, h_kv, rows, d_v]
  float* lse;  // [b, h_q, s_q], natural
  int batch, num_kv_heads, rows, group, s_q;
  ScheduleInput schedule_input;  // of the schedule, where none is given
};

// `T` is the type of `out`.
template <typename T>
ffi::Error LaunchCombine(const CombineParams& params, cudaStream_t stream);

}  // namespace jax_flashmla
