// What the warps of a decode block share: the sizes, the work, shared memory and its barriers. How
// they play together is said in handler.cu.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "sm90/fragment.cuh"
#include "sm90/global_flag.cuh"
#include "split_kv/partial_result.cuh"
#include "split_kv/schedule.cuh"

namespace jax_flashmla::dense_decode {

using namespace sm90;  // NOLINT: the PTX layer is the instruction set of these files

constexpr int kChunkColumns = 64;
constexpr int kChunks = kHeadDimK / kChunkColumns;  // of a tile; the last one is rope
constexpr int kQuarterChunks = kHeadDimV / kChunkColumns / 4;
constexpr int kRegisterChunks = 6;  // chunks of Q that score keeps in registers
constexpr int kTailChunks = kChunks - kRegisterChunks;
// The slots of V columns that they pass through.
constexpr int kQuerySlots = CeilDiv(kRegisterChunks, kQuarterChunks);

constexpr int kShortBoxTokens = 16;  // what the last tile of a sequence is rounded up to
constexpr int kValueSlots = 11;      // quarters of a tile's V columns
constexpr int kRopeSlots = 1;        // it is needed last and free first
constexpr int kMessageSlots = 2;
constexpr int kPieceSlots = 4;
constexpr int kPageBatches = 4;  // of one page id a lane

constexpr int kValueWarpgroups = 2;
constexpr int kScoreWarpgroup = 2, kLoadWarpgroup = 3;
constexpr int kLoadWarp = 0, kPlanWarp = 1, kJoinWarp = 2;  // of the load warpgroup
constexpr int kThreads = 4 * kWarpgroupSize;
constexpr int kWarpsPerWarpgroup = 4;
constexpr int kWritingWarps = kWarpsPerWarpgroup * (1 + kValueWarpgroups);  // score and value
constexpr int kFlagsPerTile = 16;  // one a writing warp, in a line of their own
static_assert(kWritingWarps <= kFlagsPerTile);
// Registers a thread: 2 * kValue + kScore + kLoad = 65536 / 128.
constexpr int kValueRegisters = 160, kScoreRegisters = 160, kLoadRegisters = 32;
static_assert(2 * kValueRegisters + kScoreRegisters + kLoadRegisters == 65536 / kWarpgroupSize);

// The bounds that matter to a block: where its part begins, at kOwnBegin, where it ends and where
// its neighbours do.
constexpr int kOwnBounds = 4, kOwnBegin = 1;

// The part that begins at the `i`th of them. Beyond the first and the last bound the same one
// stands again.
__device__ __forceinline__ int OwnBoundPart(int part, int i, int num_parts) {
  return min(max(part + i - kOwnBegin, 0), num_parts);
}

// A run of key tiles of one request.
struct Piece {
  int32_t request;
  int32_t length;      // keys of the request
  int32_t first_tile;  // of this piece
  int32_t num_tiles;   // may be 0
  int32_t slot;        // of the partial result; -1: this block writes the request's result
  int32_t joined;      // the request has two splits: this block adds the other one, or makes it
  int32_t invalid;     // a page id outside the pool, or a length beyond the table
  // Within [-length, s_q], beyond which it would change nothing.
  int32_t causal_offset;

  // Whether this block adds the other split of the request to its own.
  __device__ __forceinline__ bool AddsOther() const { return joined && slot < 0; }

  // Its pages in the block table: from one up to, not including, the other.
  __device__ __forceinline__ int FirstPage(int page_shift) const {
    return static_cast<int>(int64_t{first_tile} * kTileTokens >> page_shift);
  }
  __device__ __forceinline__ int EndPage(int page_shift) const {
    if (num_tiles == 0) return FirstPage(page_shift);
    const int64_t end = min(int64_t{first_tile + num_tiles} * kTileTokens, int64_t{length});
    return static_cast<int>((end - 1 >> page_shift) + 1);
  }
};

template <typename T>
struct SharedMemoryPlan {
  SmemTile<T> v[kValueSlots][kQuarterChunks];
  SmemTile<T> rope[kRopeSlots];
  SmemTile<T> q_tail[kTailChunks];
  SmemTile<T> p[kMessageSlots];
  float row_factor[kMessageSlots][kTileRows];
  PartBound bounds[kOwnBounds];  // where the block makes the schedule
  int warp_sums[kThreads / kWarpSize];
  Piece pieces[kPieceSlots];
  int32_t pages[kPageBatches][kWarpSize];
  Barrier v_full[kValueSlots], v_empty[kValueSlots];
  Barrier rope_full[kRopeSlots], rope_empty[kRopeSlots];
  Barrier message_full[kMessageSlots], message_empty[kMessageSlots];
  Barrier piece_full[kPieceSlots], piece_empty[kPieceSlots];
  Barrier pages_full[kPageBatches], pages_empty[kPageBatches];
  Barrier q_full, q_empty;

  // Of the other split of a request that this block joins: the log-sum-exps, and the scales of the
  // quarters, which score turns into weights. Its rows follow the last tile through `v`.
  float other_lse[kTileRows];
  float other_weight[kQuarters][kTileRows];
  Barrier other_written;
};
static_assert(sizeof(SharedMemoryPlan<__half>) <= 227 * 1024);

struct DecodeParams {
  const int32_t* block_table;    // [b, max_blocks]
  const int32_t* cache_seqlens;  // [b]
  const int32_t* causal_offset;  // [b], or null
  TileSchedule schedule;
  void* out;   // [b, h_kv, rows, d_v]
  float* lse;  // [b, h_q, s_q]
  PartialResults partial;
  // [num_parts, h_kv, row_tiles, kFlagsPerTile]: `flag_value` where a warp has written its share of
  // the split with which the part begins. Each flag that is set is cleared again by the block that
  // waits for it, since both ask BeginsInSecondOfTwo() the same, and no other call has the same
  // value. So what was in the memory before is never taken for a flag, and a captured call can be
  // replayed.
  Flag* flags;
  Flag flag_value;
  // How far all blocks have come, from whatever it held before. Only the loaders' pace follows it.
  uint32_t* progress;
  int32_t loading_blocks;  // that share it; 0: more than run at once
  int32_t batch, num_kv_heads, rows, group, s_q, row_tiles;
  int32_t num_blocks, max_blocks, page_shift;  // page_block_size = 1 << page_shift
  float scale_log2;                            // softmax_scale * log2(e)
  bool causal;
  ScheduleInput schedule_input;  // of the schedule, where none is given
};

// What one block does.
struct BlockWork {
  int part, kv_head, row_tile;
  PartBound begin, end;

  __device__ __forceinline__ explicit BlockWork(const DecodeParams& params) {
    row_tile = blockIdx.x % params.row_tiles;
    kv_head = blockIdx.x / params.row_tiles % params.num_kv_heads;
    // The last part first: blocks wait for those of later parts, which so have started before them,
    // as long as blocks start in the order of their indices. That they do is how the hardware
    // works.
    part = params.schedule.num_parts - 1 - blockIdx.x / params.row_tiles / params.num_kv_heads;
  }
  // From the bound with which the part begins on.
  __device__ __forceinline__ void SetBounds(const PartBound* bounds) {
    begin = bounds[0];
    end = bounds[1];
  }
  __device__ __forceinline__ void KeepInside(int batch) {
    begin = Inside(begin, batch);
    end = Inside(end, batch);
  }
  __device__ __forceinline__ int NumPieces() const {
    return end.request - begin.request + (end.tile > 0 ? 1 : 0);
  }
};

// The flags of the split with which a part begins, of this block's rows.
__device__ __forceinline__ Flag* FlagsOf(const DecodeParams& params, const BlockWork& work,
                                         int part) {
  const int64_t head = static_cast<int64_t>(part) * params.num_kv_heads + work.kv_head;
  return params.flags + (head * params.row_tiles + work.row_tile) * kFlagsPerTile;
}

// Hides from the compiler what a value is computed from, so that it computes it where it is used
// instead of keeping it in a register through the loops: value has none to spare.
__device__ __forceinline__ int Opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// One warp, of `kWritingWarps`, tells another block that its share of the split with which this
// part begins is written.
__device__ __forceinline__ void FlagPartial(const DecodeParams& params, const BlockWork& work) {
  ReleaseGlobalWrites();
  const int thread = Opaque(threadIdx.x);
  if (thread % kWarpSize == 0) {
    SetFlag(FlagsOf(params, work, work.part) + thread / kWarpSize, params.flag_value);
  }
}

// Position in a ring of buffers, and the parity of its current round, in one register.
template <int kSlots>
class RingCursor {
 public:
  __device__ __forceinline__ int Slot() const { return n_ < kSlots ? n_ : n_ - kSlots; }
  __device__ __forceinline__ uint32_t Parity() const { return n_ >= kSlots; }
  __device__ __forceinline__ void Advance(int by = 1) {
    n_ += by;
    if (n_ >= 2 * kSlots) n_ -= 2 * kSlots;
  }
  __device__ __forceinline__ RingCursor Before(int by) const {
    RingCursor earlier;
    earlier.n_ = n_ >= by ? n_ - by : n_ - by + 2 * kSlots;
    return earlier;
  }

 private:
  int n_ = 0;
};

__device__ __forceinline__ bool IsFirstLane() { return threadIdx.x % kWarpSize == 0; }
// Of the four lanes that share two rows of a fragment.
__device__ __forceinline__ bool IsFirstOfQuad() { return threadIdx.x % 4 == 0; }

// One warp tells the loaders of all blocks of the cluster that it has read a slot for good.
template <int kClusterSize>
__device__ __forceinline__ void Release(Barrier* empty) {
  __syncwarp();
  const int lane = threadIdx.x % kWarpSize;
  if constexpr (kClusterSize == 1) {
    if (lane == 0) Arrive(empty);
  } else {
    if (lane < kClusterSize) ArriveAtRank(empty, lane);
  }
}

}  // namespace jax_flashmla::dense_decode
