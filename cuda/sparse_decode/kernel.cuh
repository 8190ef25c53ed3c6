// Sparse decode: attention of each query to the tokens of a list, which an indexer picked.
//
// A list holds slots of a pool of tokens. It counts up to its length; an entry is valid if its slot
// is inside the pool. All heads of a query share its list, and no two queries do. A second pool may
// follow with lists of its own; one softmax goes over both. For 64 heads (a row tile) and each tile
// of 64 entries:
//
//   K = rows of the pool             64 x 576 (512 in models without rope), gathered
//   S = softmax_scale * Q K^T        64 x 64; -inf where the entry is not valid
//   P = online softmax of S          (mla/softmax.cuh)
//   O = O * factor + P V             64 x 512; V is the first 512 columns of the K tile
//
// Floor: the larger of 2 * heads * entries * (576 + 512) FLOP and entries * 1152 bytes, by the
// rates of the card. Per tile that is as much as in dense decode. But s_q queries of a sequence
// read s_q lists, and a tile takes 64 addresses instead of one.
//
// To everything but the loader a list is a sequence. So the schedule (with b * s_q sequences of h_q
// rows), the split of a block into roles, the rings, score, value, join and combine are those of
// dense decode: see dense_decode/kernel.cuh, decode/ and split_kv/. What differs:
//
//   load    One warpgroup gathers, with 32 registers a thread. Eight threads copy a row: 16 bytes
//           each of every chunk of 64 columns. The 128 threads copy 16 rows at a time; a thread has
//           the same four rows of every tile. Its first warp plans the pieces ahead, and waits for
//           the other split if the block joins two.
//   score   masks by the tile's token mask. There is no causal mask.
//   value   finds zeros in the rows of invalid entries, and clears nothing.
//
// Why it is built like this:
//
// 1. cp.async copies 16 bytes to any place, so rows land in the swizzle that the tensor cores read.
//    Tensor copies of one row do that too, but each costs its warp 28 ns, nine times a row.
// 2. Nobody waits for a copy. Each thread lets its copies arrive at the `full` barrier of a stage
//    when they are done, and goes on to the next stage: the ring is filled as far ahead as there
//    are free stages.
// 3. Indices are read a tile ahead, because a tile's addresses need them. One lane reads one index
//    and hands it to the lanes that copy its row. The lengths of 32 lists are read at once.
// 4. The loader's instructions take issue slots from score, so they are few: a thread's four rows
//    are 16 apart, which gives them the same swizzle; their addresses are computed once a tile; the
//    stages of a tile are unrolled.
// 5. Its registers are few too. What a warp counts (pieces, tiles, tails of queries) and what it
//    knows of its piece lie in shared memory, and threads compute who they are wherever they need
//    it. Keeping these values spilled.
// 6. Only the loader knows what is valid. It writes zeros for other rows (a copy of 0 bytes reads
//    nothing), so that P V stays finite, and one bit a row into the token mask.
// 7. The extra list begins a tile of its own. From that tile on the loader reads the other pool;
//    score and value do not know.
// 8. cp.async writes by another proxy than wgmma reads by. So who multiplies runs a proxy fence
//    after waiting for a stage. Score looks whether the whole tile is there; then one fence does.
// 9. With an even number of row tiles two blocks may form a cluster and work on the same lists, if
//    there is much to gather (UsesCluster in handler.cu). Each gathers half of the rows of a tile,
//    with two warps. A relay warp waits for them, runs the fence of point 8 for all, and copies
//    them to the other block. The fourth warp plans and joins.
//
// Rings: those of dense decode without `pages`. Each thread that fills a stage of v, rope or q_tail
// arrives; in a cluster it arrives at `gathered` and `rope_gathered` instead, and the relay warp
// completes the stage. One ring more:
//
//   keys.words   the token masks: load -> score. It has no `empty` barriers, because the ring of V
//                columns keeps the loader at most three tiles ahead (decode/block.cuh).
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
