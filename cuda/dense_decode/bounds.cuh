// Where the part of a block of dense decode lies: as the schedule that the call is given says, or
// made from the lengths, by each block for itself, which takes less time than a kernel ahead of it.
#pragma once

#include "dense_decode/block.cuh"

namespace jax_flashmla::dense_decode {

// All threads make the bounds that the block keeps.
template <typename T>
__device__ __forceinline__ void MakeBounds(SharedMemoryPlan<T>& smem, const DecodeParams& params,
                                           int part) {
  const int thread = threadIdx.x;
  const int num_parts = params.schedule.num_parts;
  const int own_part = OwnBoundPart(part, thread, num_parts);
  const Scheduler<kThreads> scheduler(params.schedule_input, smem.warp_sums);
  if (scheduler.IsAligned()) {
    if (thread < kOwnBounds) smem.bounds[thread] = scheduler.AlignedBound(own_part);
    return;
  }
  const int payload = scheduler.Payload();
  const bool is_end = own_part == num_parts || own_part * payload >= scheduler.Total();
  if (thread < kOwnBounds && is_end) smem.bounds[thread] = {params.batch, 0};
  scheduler.ForOwnRequests([&](const PlacedRequest& placed) {
#pragma unroll
    for (int i = 0; i < kOwnBounds; ++i) {
      const int p = OwnBoundPart(part, i, num_parts);
      const bool begins_here = p * payload >= placed.begin && p * payload < placed.End();
      if (p < num_parts && begins_here) smem.bounds[i] = scheduler.BoundInside(placed, p);
    }
  });
}

// The `i`th of the bounds that matter to a block of this part.
template <bool kMakesSchedule, typename T>
__device__ __forceinline__ PartBound OwnBound(const SharedMemoryPlan<T>& smem,
                                              const DecodeParams& params, int part, int i) {
  if constexpr (kMakesSchedule) {
    return smem.bounds[i];
  } else {
    const int own_part = OwnBoundPart(part, i, params.schedule.num_parts);
    return Inside(params.schedule.part_bounds[own_part], params.batch);
  }
}

// Whether the part that begins at the `i`th of them begins with the second of two splits. From the
// bounds alone, like all that decides who waits for whom: arrays that do not belong together may
// give wrong results, but must not make a block wait forever.
template <bool kMakesSchedule, typename T>
__device__ __forceinline__ bool BeginsInSecondOfTwo(const SharedMemoryPlan<T>& smem,
                                                    const DecodeParams& params, int part, int i) {
  const PartBound bound = OwnBound<kMakesSchedule>(smem, params, part, i);
  const PartBound before = OwnBound<kMakesSchedule>(smem, params, part, i - 1);
  const PartBound after = OwnBound<kMakesSchedule>(smem, params, part, i + 1);
  return bound.tile > 0 && (before.request < bound.request || before.tile == 0) &&
         after.request > bound.request;
}

}  // namespace jax_flashmla::dense_decode
