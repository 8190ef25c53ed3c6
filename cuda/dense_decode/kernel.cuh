// Dense decode: attention of a few queries per sequence over its paged latent cache.
//
// For 64 query rows (a row tile) and each tile of 64 tokens:
//
//   S = softmax_scale * Q K^T        64 x 64, over 576 columns (512 in models without rope)
//   P = online softmax of S          (mla/softmax.cuh)
//   O = O * factor + P V             64 x 512; V is the first 512 columns of the K tile
//
// Floor: the larger of 2 * rows * tokens * (576 + 512) FLOP and tokens * 1152 bytes, by the rates
// of the card. A tile keeps the tensor cores busy for 2176 clocks per 64 rows; its keys are 72 KB.
//
// A thread block takes a whole SM and has one row tile of one KV head. It walks over the pieces
// (runs of key tiles of one sequence) that the schedule gives to its part. Tiles are loaded in
// chunks of 64 columns; two chunks of V are a quarter. The four warpgroups have three roles:
//
//   load    One warp plans: it reads schedule, lengths and block table. One thread loads: it fills
//           a ring in shared memory with quarters of V (11 stages of 64 x 128), and a stage with
//           the rope columns (64 x 64). The queries of a piece come before its tiles. Both run
//           ahead of the other warps, across sequences. One warp joins (see 5).
//   score   One warpgroup: S = Q K^T, softmax, writes P. It holds 2/3 of Q in registers.
//   value   Two warpgroups, each with O for two quarters: O = O * factor + P V, then the output.
//
// Load is in this folder. Score, value, the layout of shared memory and the start of a block are in
// decode/, because sparse decode differs from this kernel only in how it loads
// (sparse_decode/kernel.cuh).
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
// 2. With 2/3 of Q in registers there is room for 2.75 tiles in flight, and 272 instead of 320 KB
//    move through shared memory per tile. Otherwise that traffic would be the limit.
// 3. Two blocks may form a cluster and work on the same piece for two row tiles. Each loads every
//    other chunk of a tile and multicasts it to both. The number of row tiles must be even, and it
//    pays only if there is much to read (UsesCluster in handler.cu).
// 4. A sequence that parts share is split. Each split leaves a partial result in global memory
//    (split_kv/partial_result.cuh), and combine adds them.
// 5. If there are just two splits, the block of the first one adds the second one itself, which
//    saves the launch (split_kv/join.cuh). With more splits this does not pay: the middle splits
//    end only when the first one does, so its block would wait longer than a launch takes.
//
// Rings, and who hands what to whom. Each stage has a full and an empty barrier:
//
//   v         load -> score, value -> load. Value alone frees a quarter of keys: it has P only
//             after score has read the tile. Score frees the stages that hold queries. The rows of
//             another split come last and are never freed.
//   rope      load -> score -> load; not there without rope
//             In a cluster v and rope are freed to the loaders of both blocks, as both write.
//   q_tail    the other third of Q: load -> score -> load. Without rope it is a quarter of Q, and
//             there are two stages.
//   message   P of a tile and the row factors, or the last factors of a piece: score -> value ->
//             score
//   pages     page ids: plan -> load -> plan
//   pieces    plan -> load, score, value -> plan
//
// One barrier that is no ring, completed at most once a launch:
//
//   other     what a block needs of the other split: join -> load, score; then score -> value with
//             the last message
//
// Across thread blocks: the block of part p may wait for that of part p + 1 (split_kv/join.cuh;
// BlockWork says why that cannot hang). The blocks of a cluster wait for each other's free stages,
// and for each other at the start and at the end.
#pragma once

#include "decode/roles.cuh"
#include "dense_decode/loader.cuh"
#include "split_kv/planner.cuh"

namespace jax_flashmla::dense_decode {

constexpr int kLoadWarp = 0, kPlanWarp = 1, kJoinWarp = 2;  // of the load warpgroup

// The three warps of the load warpgroup that have something to do. The warps come back together
// (__syncwarp) before each wait for the cluster, because barrier.cluster is an aligned instruction.
template <typename Config, bool kMakesSchedule>
__device__ __forceinline__ void RunLoadWarpgroup(SharedMemoryPlan<Config>& smem,
                                                 const LoadMaps& maps, const DenseParams& params,
                                                 const BlockBounds<kMakesSchedule>& bounds,
                                                 const BlockWork& work) {
  constexpr int kClusterSize = Config::kClusterSize;
  const DecodeParams& decode = params.decode;
  const int warp = WarpUniform(threadIdx.x / kWarpSize) % kWarpsPerWarpgroup;
  if (warp == kPlanWarp) {
    // Plan touches its own block alone, so it waits for the cluster only afterwards. (Under
    // racecheck the wait returns when all threads are there. Waiting first, plan would then never
    // get to make room for a block with more than kPieceStages pieces.)
    const PageSource<kPageStages> source(params.table, params.cache_seqlens, params.causal_offset,
                                         decode.query.s_q, smem.keys.ids, smem.keys.ready);
    Planner(source, bounds, smem.pieces, smem.pieces_ready).Run(work);
    __syncwarp();
    AwaitCluster<kClusterSize>();
  } else if (warp == kLoadWarp) {
    Loader<Config> loader(smem, maps, params, work);
    const bool elected = IsElected();
    if (elected) loader.LoadFirstQueries(work);
    __syncwarp();
    AwaitCluster<kClusterSize>();
    if (elected) loader.Run(work);
  } else {
    AwaitCluster<kClusterSize>();
    if (warp == kJoinWarp) {
      Joiner<kWritingWarps, kMakesSchedule>(smem.other, bounds, decode.query, decode.partial,
                                            decode.flags)
          .Run(work);
    }
  }
  __syncwarp();
}

template <typename Config, bool kMakesSchedule>
__global__ void __launch_bounds__(kThreads, 1)
    DenseDecodeKernel(const __grid_constant__ CUtensorMap q_map,
                      const __grid_constant__ CUtensorMap k_map,
                      const __grid_constant__ CUtensorMap k_short_map,
                      const __grid_constant__ CUtensorMap o_map,
                      const __grid_constant__ DenseParams params) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  auto& smem = *reinterpret_cast<SharedMemoryPlan<Config>*>(shared_memory);
  if (threadIdx.x == kWarpSize) {
    PrefetchTensorMap(&q_map);
    PrefetchTensorMap(&k_map);
  }
  RunBlock<Config, kMakesSchedule>(
      smem, params.decode, [&](const BlockBounds<kMakesSchedule>& bounds, const BlockWork& work) {
        RunLoadWarpgroup<Config, kMakesSchedule>(smem, {q_map, k_map, k_short_map, o_map}, params,
                                                 bounds, work);
      });
}

}  // namespace jax_flashmla::dense_decode
