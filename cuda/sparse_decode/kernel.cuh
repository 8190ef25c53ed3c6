// Sparse decode: attention of each query to the tokens of a list.
#pragma once

#include "decode/roles.cuh"
#include "sparse_decode/loader.cuh"

namespace jax_flashmla::sparse_decode {

constexpr int kRelayWarp = 2, kPlanWarp = 3;  // of the load warpgroup, in a cluster

template <typename Config, bool kMakesSchedule>
__device__ __forceinline__ void RunLoadWarpgroup(SharedMemoryPlan<Config>& smem,
                                                 const SparseParams& params,
                                                 const BlockBounds<kMakesSchedule>& bounds,
                                                 const BlockWork& work) {
  if (threadIdx.x % kWarpgroupSize == 0) smem.keys.work = work;
  NamedBarrierSync(1 + kLoadWarpgroup, kWarpgroupSize);
  AwaitCluster<Config::kClusterSize>();
  if (smem.keys.work.NumPieces() <= 0) return;
  const int warp = WarpUniform(threadIdx.x / kWarpSize) % kWarpsPerWarpgroup;
  if (warp < Config::kGatherWarps) {
    GatherLoader<Config, kMakesSchedule> loader(smem, params, bounds);
    loader.LoadFirstQueries();
    loader.Run();
  } else if (warp == kRelayWarp) {
    Relay<Config>(smem).Run();
  } else {
    ListPlanner<Config, kMakesSchedule> planner(smem, params, bounds);
    for (int i = 0; i < smem.keys.work.NumPieces(); ++i) planner.Plan(i);
    planner.Join();
  }
  __syncwarp();
}

template <typename Config, bool kMakesSchedule>
__global__ void __launch_bounds__(kThreads, 1)
    SparseDecodeKernel(const __grid_constant__ SparseParams params) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  auto& smem = *reinterpret_cast<SharedMemoryPlan<Config>*>(shared_memory);
  RunBlock<Config, kMakesSchedule>(
      smem, params.decode, [&](const BlockBounds<kMakesSchedule>& bounds, const BlockWork& work) {
        RunLoadWarpgroup<Config, kMakesSchedule>(smem, params, bounds, work);
      });
}

}  // namespace jax_flashmla::sparse_decode
