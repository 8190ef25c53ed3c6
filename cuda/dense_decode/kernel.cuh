// Dense decode: attention of a few queries a sequence over its paged latent cache.
//
// For 64 query rows (a row tile) and each tile of 64 tokens:
//
//   S = softmax_scale * Q K^T        64 x 64, over 576 columns
//   P = online softmax of S          (mla/softmax.cuh)
//   O = O * factor + P V             64 x 512; V is the first 512 columns of the K tile
//
// Floor: the larger of 2 * rows * tokens * (576 + 512) FLOP and tokens * 1152 bytes, by the rates
// of the card. A tile takes 2176 clocks of the tensor cores for 64 rows, and 72 KB are to be
// loaded.
//
// A thread block takes a whole SM and has one row tile. It walks over the pieces (runs of key tiles
// of one sequence) that the schedule gives to its part. Its four warpgroups have three roles:
//
//   load    One warp plans: it reads schedule, lengths and block table. One thread loads: it fills
//   a
//           ring in shared memory with quarters of V columns (11 stages of 64 x 128), a tile of
//           rope columns (64 x 64) and, before the tiles of a piece, its queries. Both run ahead of
//           the other warps, across sequences. One warp joins (see 5).
//   score   One warpgroup: S = Q K^T, softmax, writes P. It holds 2/3 of Q in registers.
//   value   Two warpgroups, each with O for two quarters of the 512 columns: O = O * factor + P V,
//           then the output.
//
//   tensor cores:  | S(n+1)      | O(n)        | S(n+2)      | O(n+1)      |
//   score          | S(n+1)      | softmax n+1 | S(n+2)      | softmax n+2 |
//   value 0, 1     | rescale     | O(n)        | rescale     | O(n+1)      |
//
// Why it is built like this:
//
// 1. The tensor cores should always have a product queued while softmax runs. So score announces
//    P(n) to value only when it has issued 3/4 of S(n+1). Earlier would be worse: while value
//    multiplies too, S gets a fifth of the tensor cores. If tile n+1 has not arrived yet, score
//    announces P(n) at once.
// 2. With Q in registers there is room for 2.75 tiles in flight, and shared memory moves a sixth
//    less. Otherwise its traffic would be the limit.
// 3. Two blocks may form a cluster and work on the same piece for two row tiles. Each loads every
//    other chunk of a tile and multicasts it to both. That pays where the number of row tiles is
//    even and there is much to read.
// 4. A sequence that parts share is split. Each split leaves a partial result in global memory
//    (split_kv/partial_result.cuh), and combine adds them.
// 5. If there are just two splits, the block of the first one adds the second one itself, which
//    saves the launch (split_kv/join.cuh). With more splits the middle ones end at the same time as
//    all others do; there a launch costs less than the wait.
//
// Rings, and who hands what to whom (each stage has a full and an empty barrier):
//   v, rope   load -> score, and value for v -> load of both blocks of a cluster, as both write
//   q_tail    load -> score -> load
//   message   P and the row factors: score -> value -> score
//   pages     plan -> load -> plan
//   pieces    plan -> load, score, value -> plan
//   other     join -> load, score; once a launch
#pragma once

#include "dense_decode/accumulator.cuh"
#include "dense_decode/loader.cuh"
#include "dense_decode/scorer.cuh"
#include "split_kv/planner.cuh"

namespace jax_flashmla::dense_decode {

template <int kClusterSize>
__device__ __forceinline__ void AwaitCluster() {
  if constexpr (kClusterSize > 1) ClusterWait();
}

template <typename T, int kClusterSize, bool kMakesSchedule>
__global__ void __launch_bounds__(kThreads, 1)
    DenseDecodeKernel(const __grid_constant__ CUtensorMap q_map,
                      const __grid_constant__ CUtensorMap k_map,
                      const __grid_constant__ CUtensorMap k_short_map,
                      const __grid_constant__ CUtensorMap o_map,
                      const __grid_constant__ DecodeParams params) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  auto& smem = *reinterpret_cast<SharedMemoryPlan<T>*>(shared_memory);
  if (threadIdx.x == 0) smem.template InitBarriers<kClusterSize>();
  if (threadIdx.x == kWarpSize) {
    PrefetchTensorMap(&q_map);
    PrefetchTensorMap(&k_map);
  }
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
  const BlockBounds<kMakesSchedule> bounds{smem.bounds, params.schedule, params.batch};

  const int warpgroup = WarpUniform(threadIdx.x / kWarpgroupSize);
  if (warpgroup == kLoadWarpgroup) {
    ShrinkRegisters<kLoadRegisters>();
    const int warp = WarpUniform(threadIdx.x / kWarpSize) % kWarpsPerWarpgroup;
    if (warp == kPlanWarp) {
      const PageSource<kPageStages> source(params.table, params.cache_seqlens, params.causal_offset,
                                           params.query.s_q, smem.pages, smem.pages_ready);
      Planner(source, bounds, smem.pieces, smem.pieces_ready).Run(work);
      __syncwarp();
      AwaitCluster<kClusterSize>();
    } else if (warp == kLoadWarp) {
      Loader<T, kClusterSize> loader(smem, q_map, k_map, k_short_map, o_map, params);
      const bool elected = IsElected();
      if (elected) loader.LoadFirstQueries(work);
      __syncwarp();
      AwaitCluster<kClusterSize>();
      if (elected) loader.Run(work);
    } else {
      AwaitCluster<kClusterSize>();
      if (warp == kJoinWarp) {
        Joiner<kWritingWarps, kMakesSchedule>(smem.other, bounds, params.query, params.partial,
                                              params.flags)
            .Run(work);
      }
    }
    __syncwarp();
  } else if (warpgroup == kScoreWarpgroup) {
    GrowRegisters<kScoreRegisters>();
    AwaitCluster<kClusterSize>();
    Scorer<T, kClusterSize>(smem, params).Run(work);
  } else {
    GrowRegisters<kValueRegisters>();
    AwaitCluster<kClusterSize>();
    ValueAccumulator<T, kClusterSize>(smem, params, warpgroup).Run(work);
  }
  // A block must not leave while the other block of its cluster may still write to its memory.
  if constexpr (kClusterSize > 1) ClusterArrive();
  AwaitCluster<kClusterSize>();
}

}  // namespace jax_flashmla::dense_decode
