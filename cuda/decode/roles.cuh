// How a decode block begins, and which warpgroup has which role: score and value are those of this
// folder, load is the kernel's own.
#pragma once

#include "decode/accumulator.cuh"
#include "decode/scorer.cuh"

namespace jax_flashmla::decode {

template <int kClusterSize>
__device__ __forceinline__ void AwaitCluster() {
  if constexpr (kClusterSize > 1) ClusterWait();
}

// The body of a decode kernel. The load warpgroup calls `load(bounds, work)`. In a cluster that
// must call AwaitCluster() in every warp, before the warp first writes to the other block.
template <typename Config, bool kMakesSchedule, typename Load>
__device__ __forceinline__ void RunBlock(SharedMemoryPlan<Config>& smem, const DecodeParams& params,
                                         Load&& load) {
  constexpr int kClusterSize = Config::kClusterSize;
  if (threadIdx.x == 0) smem.InitBarriers();
  WaitForPriorKernels();
  BlockWork work(params.query, params.schedule.num_parts);
  if constexpr (kMakesSchedule) {
    MakeBounds<kThreads>(params.schedule_input, params.schedule.num_parts, params.batch, work.part,
                         smem.warp_sums, smem.bounds);
  } else {
    // These loads are in flight while the block meets below.
    work.SetBounds(params.schedule.part_bounds + work.part);
  }
  // Nobody waits for the other block of the cluster here: each role waits before it first writes to
  // that block or signals it.
  if constexpr (kClusterSize > 1) {
    __syncwarp();
    ClusterArrive();
  }
  __syncthreads();
  AllowNextKernel();  // after the wait for prior kernels, because combine relies on that order
  if constexpr (kMakesSchedule) {
    work.SetBounds(smem.bounds + kOwnBegin);
  } else {
    work.ClampBounds(params.batch);
  }

  const int warpgroup = WarpUniform(threadIdx.x / kWarpgroupSize);
  if (warpgroup == kLoadWarpgroup) {
    ShrinkRegisters<kLoadRegisters>();
    const BlockBounds<kMakesSchedule> bounds{smem.bounds, params.schedule, params.batch};
    load(bounds, work);
  } else if (warpgroup == kScoreWarpgroup) {
    GrowRegisters<kScoreRegisters>();
    AwaitCluster<kClusterSize>();
    Scorer<Config>(smem, params).Run(work);
  } else {
    GrowRegisters<kValueRegisters>();
    AwaitCluster<kClusterSize>();
    ValueAccumulator<Config>(smem, params, warpgroup).Run(work);
  }
  // A block must not leave while the other block of its cluster may still write to its memory.
  if constexpr (kClusterSize > 1) ClusterArrive();
  AwaitCluster<kClusterSize>();
}

}  // namespace jax_flashmla::decode
