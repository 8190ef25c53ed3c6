// What the warps of a decode block share: sizes, shared memory, barriers and parameters. Dense and
// sparse decode have it in common; a Config says which of them a kernel is. How the warps work
// together is told in dense_decode/kernel.cuh, what sparse decode loads in another way in
// sparse_decode/kernel.cuh.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "mla/sink.cuh"
#include "split_kv/join.cuh"

namespace jax_flashmla::decode {

using namespace sm90;      // NOLINT: used in nearly every line
using namespace split_kv;  // NOLINT

constexpr int kChunkColumns = 64;
constexpr int kQuarterChunks = kQuarterColumns / kChunkColumns;
constexpr int kRegisterChunks = 6;  // chunks of Q that score keeps in registers
// These chunks of Q pass through the ring of V columns, in this many stages.
constexpr int kQueryStages = CeilDiv(kRegisterChunks, kQuarterChunks);

constexpr int kValueStages = 11;  // a stage is a quarter of a tile's V columns
constexpr int kRopeStages = 1;    // one is enough: S needs rope last, and frees it first
constexpr int kMessageStages = 2;
constexpr int kPieceStages = 4;

constexpr int kValueWarpgroups = 2;
constexpr int kScoreWarpgroup = 2, kLoadWarpgroup = 3;
constexpr int kThreads = 4 * kWarpgroupSize;
constexpr int kWritingWarps = kWarpsPerWarpgroup * (1 + kValueWarpgroups);  // value and score
// Registers of a thread. All four warpgroups together have the 65536 registers of an SM.
constexpr int kValueRegisters = 160, kScoreRegisters = 160, kLoadRegisters = 32;
static_assert(2 * kValueRegisters + kScoreRegisters + kLoadRegisters == 65536 / kWarpgroupSize);

// How the keys of a sequence are found.
enum class Keys {
  kPaged,   // in order, in pages: dense decode. One thread loads them, by the copy engine.
  kListed,  // by a list of tokens: sparse decode. A warpgroup gathers them.
};

// A variant of the decode kernel.
template <typename T, int kHeadDim, Keys kKeysOf, int kCluster>
struct Config {
  using Element = T;
  static constexpr Keys kKeys = kKeysOf;
  static constexpr int kClusterSize = kCluster;             // blocks that fill the rings together
  static constexpr int kChunks = kHeadDim / kChunkColumns;  // of a tile; a ninth one is rope
  static constexpr bool kHasRope = kChunks > kHeadDimV / kChunkColumns;
  static constexpr int kTailChunks = kChunks - kRegisterChunks;
  // Without rope there is room for the queries of two pieces.
  static constexpr int kTailStages = kHasRope ? 1 : 2;
  // Warps that gather listed keys. In a cluster each block gathers half of them, and a warp passes
  // them on to the other block.
  static constexpr int kGatherWarps = kCluster > 1 ? 2 : kWarpsPerWarpgroup;
  static constexpr bool kRelays = kKeys == Keys::kListed && kCluster > 1;
  // Which arrivals complete a stage of keys or of queries, and how many warps read the pieces.
  static constexpr int kTailArrivals = kKeys == Keys::kPaged ? 1 : kGatherWarps * kWarpSize;
  static constexpr int kKeyArrivals = kRelays ? 1 : kTailArrivals;
  static constexpr int kLoadWarps = kKeys == Keys::kPaged ? 1 : kGatherWarps + (kRelays ? 1 : 0);
};

// The columns of K that are not columns of V.
template <typename T, bool kHasRope>
struct RopeRing {
  SmemTile<T> tiles[kRopeStages];
};
template <typename T>
struct RopeRing<T, false> {};

// What the loader of paged keys is told: which pages to load.
constexpr int kPageStages = 4;  // a stage is 32 page ids
struct PageIds {
  int32_t ids[kPageStages][kWarpSize];
  RingBarriers<kPageStages> ready;

  __device__ __forceinline__ void Init() { ready.Init(kWarpSize, 1); }
};

// What the loaders of listed keys tell, and what they keep here because their registers are few.
//
// `words` says which tokens of a tile are valid: bit 4i + q of half-word w stands for row
// 16i + 4w + q (q < 4). This ring needs no `empty` barriers, because at most three tiles are in the
// ring of V columns, and one more has its mask.
constexpr int kTokenMaskStages = 4;
static_assert(kValueStages <= (kTokenMaskStages - 1) * kQuarters);
template <int kGatherWarps>
struct TokenMasks {
  alignas(8) uint16_t words[kTokenMaskStages][kWarpsPerWarpgroup];
  Barrier written[kTokenMaskStages];
  // In a cluster: this block's own rows of a stage are there.
  Barrier gathered[kValueStages], rope_gathered[kRopeStages];
  BlockWork work;
  int32_t main_lengths[kWarpSize], extra_lengths[kWarpSize];  // of the next lists
  // How many pieces, tails of queries and tiles each warp has loaded.
  uint32_t pieces[kGatherWarps], tails[kGatherWarps], tiles[kGatherWarps];

  __device__ __forceinline__ void Init() {
    for (Barrier& barrier : written) BarrierInit(&barrier, kGatherWarps);
    for (Barrier& barrier : gathered) BarrierInit(&barrier, kGatherWarps * kWarpSize);
    for (Barrier& barrier : rope_gathered) BarrierInit(&barrier, kGatherWarps * kWarpSize);
    for (int i = 0; i < kGatherWarps; ++i) pieces[i] = tails[i] = tiles[i] = 0;
  }
};

template <typename Config>
struct SharedMemoryPlan {
  using T = Config::Element;
  using KeyMemory =
      std::conditional_t<Config::kKeys == Keys::kPaged, PageIds, TokenMasks<Config::kGatherWarps>>;
  SmemTile<T> v[kValueStages][kQuarterChunks];
  [[no_unique_address]] RopeRing<T, Config::kHasRope> rope;
  SmemTile<T> q_tail[Config::kTailStages][Config::kTailChunks];
  SmemTile<T> p[kMessageStages];
  float row_factor[kMessageStages][kTileRows];
  PartBound bounds[kOwnBounds];  // set only if the block makes the schedule itself
  int warp_sums[kThreads / kWarpSize];
  Piece pieces[kPieceStages];
  KeyMemory keys;
  RingBarriers<kValueStages> v_ready;
  RingBarriers<kRopeStages> rope_ready;
  RingBarriers<kMessageStages> message_ready;
  RingBarriers<kPieceStages> pieces_ready;
  RingBarriers<Config::kTailStages> q_tail_ready;
  OtherSplit other;  // of a sequence that this block joins; its rows pass through `v`

  __device__ __forceinline__ void InitBarriers() {
    constexpr int kValueThreads = kWarpgroupSize * kValueWarpgroups;
    // One warpgroup frees a stage of v: value, or score if it held queries.
    v_ready.Init(Config::kKeyArrivals, kWarpsPerWarpgroup * Config::kClusterSize);
    rope_ready.Init(Config::kKeyArrivals, kWarpsPerWarpgroup * Config::kClusterSize);
    message_ready.Init(kWarpgroupSize, kValueThreads);
    pieces_ready.Init(1, Config::kLoadWarps + kWarpgroupSize + kValueThreads);
    q_tail_ready.Init(Config::kTailArrivals, kWarpsPerWarpgroup);
    keys.Init();
    other.Init();
    FenceBarrierInit();
  }
};

static_assert(sizeof(SharedMemoryPlan<Config<__half, kHeadDimK, Keys::kPaged, 1>>) <= 227 * 1024);

// The parameters that dense and sparse decode have in common.
struct DecodeParams {
  TileSchedule schedule;
  void* out;   // [b, h_kv, rows, d_v]
  float* lse;  // [b, h_q, s_q]
  PartialResults partial;
  PartialFlags flags;
  AttnSink sink;
  int32_t batch;  // sequences of the schedule
  QueryShape query;
  float scale_log2;  // softmax_scale * log2(e)
  bool causal;
  ScheduleInput schedule_input;  // the schedule is made from this where none is given
};

}  // namespace jax_flashmla::decode
