// The launch that combines the partial results of sequences with more than kJoinedSplits splits.
#pragma once

#include "host/launch.h"
#include "mla/sink.cuh"
#include "split_kv/partial_result.cuh"
#include "split_kv/schedule.cuh"

namespace jax_flashmla::split_kv {

struct CombineParams {
  TileSchedule schedule;
  PartialResults partial;
  void* out;   // [b, h_kv, rows, d_v]
  float* lse;  // [b, h_q, s_q], natural
  int32_t batch;
  QueryShape query;
  AttnSink sink;
  ScheduleInput schedule_input;  // the schedule is made from this where none is given
};

// `T` is the element type of `out`; `op` is the name of the op in error messages. The decode kernel
// must be launched right before, on the same stream.
template <typename T>
ffi::Error LaunchCombine(const char* op, const CombineParams& params, cudaStream_t stream);

}  // namespace jax_flashmla::split_kv
