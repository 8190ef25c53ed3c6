// What one thread block of a split decode works on.
//
// A block has one part of the schedule, one KV head and one row tile. It works through the pieces
// of its part: a piece is a run of key tiles of one sequence. The first and the last piece of a
// part may belong to sequences that other parts share.
#pragma once

#include "sm90/global_flag.cuh"
#include "sm90/pipeline.cuh"
#include "split_kv/partial_result.cuh"
#include "split_kv/schedule.cuh"

namespace jax_flashmla::split_kv {

using namespace sm90;  // NOLINT: used in nearly every line

struct BlockWork {
  int part, kv_head, row_tile;
  PartBound begin, end;

  BlockWork() = default;
  __device__ __forceinline__ BlockWork(const QueryShape& query, int num_parts) {
    row_tile = blockIdx.x % query.row_tiles;
    kv_head = blockIdx.x / query.row_tiles % query.num_kv_heads;
    // Highest part first. A block may wait for a block of part p + 1, so that one must be scheduled
    // earlier. We rely on blocks launching in blockIdx order (undocumented, true on sm_90).
    part = num_parts - 1 - blockIdx.x / query.row_tiles / query.num_kv_heads;
  }
  // `bounds` points to the bound where the part begins; the next one is where it ends.
  __device__ __forceinline__ void SetBounds(const PartBound* bounds) {
    begin = bounds[0];
    end = bounds[1];
  }
  __device__ __forceinline__ void ClampBounds(int batch) {
    begin = ClampToBatch(begin, batch);
    end = ClampToBatch(end, batch);
  }
  __device__ __forceinline__ int NumPieces() const {
    return end.sequence - begin.sequence + (end.tile > 0 ? 1 : 0);
  }
};

// A run of key tiles of one sequence.
struct Piece {
  int32_t sequence;
  int32_t length;  // keys of the sequence
  int32_t first_tile;
  int32_t num_tiles;      // may be 0
  int32_t partial_index;  // where the partial result goes; -1: this block writes the final result
  int32_t joined;         // the sequence has two splits, and this block makes one of them
  int32_t main_length;    // of a list of tokens: without those of the extra list
  int32_t invalid;        // a page id outside the pool, or a length beyond the block table
  int32_t causal_offset;  // clamped to [-length, s_q]; beyond that it would change nothing

  // Whether this block adds the other split of the sequence to its own.
  __device__ __forceinline__ bool AddsOther() const { return joined && partial_index < 0; }

  // Whether queries pass through the ring of keys ahead of this piece's tiles. The loader, the
  // scorer and the accumulator all ask this, because their cursors must agree. The queries of a
  // block's first piece are loaded before it is known whether that piece has any tiles.
  __device__ __forceinline__ bool HasQueries(bool is_first_of_block) const {
    return is_first_of_block || num_tiles > 0;
  }
};

// A block needs four bounds: where its part begins (index kOwnBegin), where it ends, and one more
// on either side. They tell whether its first and its last sequence have exactly two splits.
constexpr int kOwnBounds = 4, kOwnBegin = 1;

// The part of bound `i` of the four. The first and the last bound of the schedule repeat.
__device__ __forceinline__ int OwnBoundPart(int part, int i, int num_parts) {
  return min(max(part + i - kOwnBegin, 0), num_parts);
}

// All threads make the block's four bounds from the lengths. Every block does this for itself,
// which takes less time than a kernel ahead of this one.
template <int kThreads>
__device__ __forceinline__ void MakeBounds(const ScheduleInput& input, int num_parts, int batch,
                                           int part, int (&warp_sums)[kThreads / kWarpSize],
                                           PartBound (&bounds)[kOwnBounds]) {
  const int thread = threadIdx.x;
  const int own_part = OwnBoundPart(part, thread, num_parts);
  const Scheduler<kThreads> scheduler(input, warp_sums);
  if (scheduler.IsAligned()) {
    if (thread < kOwnBounds) bounds[thread] = scheduler.AlignedBound(own_part);
    return;
  }
  const int payload = scheduler.Payload();
  const bool is_end = own_part == num_parts || own_part * payload >= scheduler.Total();
  if (thread < kOwnBounds && is_end) bounds[thread] = {batch, 0};
  scheduler.ForOwnSequences([&](const PlacedSequence& placed) {
#pragma unroll
    for (int i = 0; i < kOwnBounds; ++i) {
      const int p = OwnBoundPart(part, i, num_parts);
      const bool begins_here = p * payload >= placed.begin && p * payload < placed.End();
      if (p < num_parts && begins_here) bounds[i] = scheduler.BoundInside(placed, p);
    }
  });
}

// The four bounds of a block, from the schedule that the call was given or from those that
// the block made itself.
template <bool kMakesSchedule>
struct BlockBounds {
  const PartBound (&made)[kOwnBounds];  // in shared memory
  const TileSchedule& schedule;
  int32_t batch;

  __device__ __forceinline__ PartBound At(int part, int i) const {
    if constexpr (kMakesSchedule) {
      return made[i];
    } else {
      return ClampToBatch(schedule.part_bounds[OwnBoundPart(part, i, schedule.num_parts)], batch);
    }
  }

  // Whether the part that begins at bound `i` begins with the second of exactly two splits. This
  // decides which block waits for which, and it follows from the bounds alone: if the arrays of a
  // schedule do not belong together, results may be wrong, but no block may wait forever.
  __device__ __forceinline__ bool BeginsInSecondOfTwo(int part, int i) const {
    const PartBound bound = At(part, i), before = At(part, i - 1), after = At(part, i + 1);
    return bound.tile > 0 && (before.sequence < bound.sequence || before.tile == 0) &&
           after.sequence > bound.sequence;
  }
};

// Flags by which a block tells another one that its partial result is written: one for each writing
// warp, in a line of 128 bytes of their own for each part, KV head and row tile.
//
// A flag is set when it holds `value`, which is different in every call. The block that waits for a
// flag clears it afterwards. So old memory contents are never taken for a flag that is set, and a
// captured call can be replayed.
constexpr int kFlagsPerRowTile = 16;
// A word of its own in the first line: how far all blocks have come. Writing warps use fewer flags.
constexpr int kProgressWord = kFlagsPerRowTile - 1;

struct PartialFlags {
  Flag* flags;  // [num_parts, h_kv, row_tiles, kFlagsPerRowTile]
  Flag value;

  // The flags of the split with which a part begins, for the rows of this block.
  __device__ __forceinline__ Flag* Of(const QueryShape& query, const BlockWork& work,
                                      int part) const {
    const int64_t head = static_cast<int64_t>(part) * query.num_kv_heads + work.kv_head;
    return flags + (head * query.row_tiles + work.row_tile) * kFlagsPerRowTile;
  }

  // A warp sets its flag after it has written its share of the split with which this part begins.
  // The writing warps must be the first warps of the block.
  __device__ __forceinline__ void Set(const QueryShape& query, const BlockWork& work) const {
    ReleaseGlobalWrites();
    const int thread = Opaque(threadIdx.x);
    if (thread % kWarpSize == 0) SetFlag(Of(query, work, work.part) + thread / kWarpSize, value);
  }
};

}  // namespace jax_flashmla::split_kv
