// What the warps of a dense decode block share: sizes, shared memory, barriers and parameters.
// kernel.cuh says how the warps work together.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "split_kv/join.cuh"
#include "split_kv/page_source.cuh"

namespace jax_flashmla::dense_decode {

using namespace sm90;      // NOLINT: used in nearly every line
using namespace split_kv;  // NOLINT

constexpr int kChunkColumns = 64;
constexpr int kChunks = kHeadDimK / kChunkColumns;  // of a tile; the last one is rope
constexpr int kQuarterChunks = kQuarterColumns / kChunkColumns;
constexpr int kRegisterChunks = 6;  // chunks of Q that score keeps in registers
constexpr int kTailChunks = kChunks - kRegisterChunks;
// These chunks of Q pass through the ring of V columns, in this many stages.
constexpr int kQueryStages = CeilDiv(kRegisterChunks, kQuarterChunks);

constexpr int kShortBoxTokens = 16;  // a short last tile is loaded in boxes of this many
constexpr int kValueStages = 11;     // a stage is a quarter of a tile's V columns
constexpr int kRopeStages = 1;       // one is enough: S needs rope last, and frees it first
constexpr int kMessageStages = 2;
constexpr int kPieceStages = 4;
constexpr int kPageStages = 4;  // a stage is 32 page ids

constexpr int kValueWarpgroups = 2;
constexpr int kScoreWarpgroup = 2, kLoadWarpgroup = 3;
constexpr int kLoadWarp = 0, kPlanWarp = 1, kJoinWarp = 2;  // of the load warpgroup
constexpr int kThreads = 4 * kWarpgroupSize;
constexpr int kWritingWarps = kWarpsPerWarpgroup * (1 + kValueWarpgroups);  // value and score
// Registers of a thread. All four warpgroups together have the 65536 registers of an SM.
constexpr int kValueRegisters = 160, kScoreRegisters = 160, kLoadRegisters = 32;
static_assert(2 * kValueRegisters + kScoreRegisters + kLoadRegisters == 65536 / kWarpgroupSize);

template <typename T>
struct SharedMemoryPlan {
  SmemTile<T> v[kValueStages][kQuarterChunks];
  SmemTile<T> rope[kRopeStages];
  SmemTile<T> q_tail[kTailChunks];
  SmemTile<T> p[kMessageStages];
  float row_factor[kMessageStages][kTileRows];
  PartBound bounds[kOwnBounds];  // set only if the block makes the schedule itself
  int warp_sums[kThreads / kWarpSize];
  Piece pieces[kPieceStages];
  int32_t pages[kPageStages][kWarpSize];
  RingBarriers<kValueStages> v_ready;
  RingBarriers<kRopeStages> rope_ready;
  RingBarriers<kMessageStages> message_ready;
  RingBarriers<kPieceStages> pieces_ready;
  RingBarriers<kPageStages> pages_ready;
  RingBarriers<1> q_tail_ready;
  OtherSplit other;  // of a sequence that this block joins; its rows pass through `v`

  // `kClusterSize`: how many blocks fill these rings together.
  template <int kClusterSize>
  __device__ __forceinline__ void InitBarriers() {
    constexpr int kValueThreads = kWarpgroupSize * kValueWarpgroups;
    // One warpgroup frees a stage of v: value, or score if it held queries.
    v_ready.Init(1, kWarpsPerWarpgroup * kClusterSize);
    rope_ready.Init(1, kWarpsPerWarpgroup * kClusterSize);
    message_ready.Init(kWarpgroupSize, kValueThreads);
    pieces_ready.Init(1, 1 + kWarpgroupSize + kValueThreads);
    pages_ready.Init(kWarpSize, 1);
    q_tail_ready.Init(1, kWarpsPerWarpgroup);
    other.Init();
    FenceBarrierInit();
  }
};
static_assert(sizeof(SharedMemoryPlan<__half>) <= 227 * 1024);

struct DecodeParams {
  PageTable table;
  const int32_t* cache_seqlens;  // [b]
  const int32_t* causal_offset;  // [b], or null
  TileSchedule schedule;
  void* out;   // [b, h_kv, rows, d_v]
  float* lse;  // [b, h_q, s_q]
  PartialResults partial;
  PartialFlags flags;
  // The cost units that all blocks have done so far, plus whatever it held before. It sets the pace
  // of the loaders and nothing else. It shares memory with the flags.
  uint32_t* progress;
  int32_t loading_blocks;  // 0: not all blocks run at once, so none adapts its pace
  int32_t batch;
  QueryShape query;
  float scale_log2;  // softmax_scale * log2(e)
  bool causal;
  ScheduleInput schedule_input;  // the schedule is made from this where none is given
};

}  // namespace jax_flashmla::dense_decode
