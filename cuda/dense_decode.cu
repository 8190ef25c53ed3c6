// Dense decode: attention of a few queries a sequence over its paged latent cache.
//
// What: S = softmax_scale * Q K^T (64 query rows by 64 tokens by 576 columns), online softmax,
// O += P V, where V is the first 512 columns of the same K tile.
//
// Floor: max(2 * rows * tokens * (576 + 512) FLOP, tokens * 1152 bytes), by the chip's ceilings.
// A tile is 2176 clocks of tensor core per 64 rows, and 72 KB to load.
//
// Plan. One block an SM, each with one row tile (64 query rows); blocks walk the pieces (a run of
// key tiles of one request) that the tile schedule gives to their part. Four warpgroups:
//
//   load    one warp. Runs ahead of everything else, across requests: fills a ring of shared
//           memory with half tiles of V columns (5 slots of 64 x 256), rope columns (3 slots of
//           64 x 64) and, ahead of a piece's tiles, its queries.
//   score   holds 2/3 of Q in registers, S = Q K^T, softmax, writes P.
//   value   two warpgroups, each holding O for 256 of the 512 columns: rescale, O += P V, output.
//
//   tensor cores:  | S(n+1)      | O(n)        | S(n+2)      | O(n+1)      |
//   score          | S(n+1)      | softmax n+1 | S(n+2)      | softmax n+2 |
//   value 0, 1     | rescale     | O(n)        | rescale     | O(n+1)      |
//
// The score warpgroup announces P(n) when it has issued S(n+1), so that the tensor cores always
// have one product queued while softmax runs; if the tile of S(n+1) has not arrived yet, it
// announces P(n) at once. Keeping Q in registers makes room for 2.5 tiles in flight and takes a
// sixth off the shared-memory traffic, which would be the limit otherwise.
//
// Where there is an even number of row tiles, two blocks form a cluster, work on the same piece
// and share its tiles: each loads every other chunk and multicasts it to both.
//
// Ordering. full barriers: the copy engine -> score and value; v_empty, rope_empty: their readers
// -> load (of both blocks of a cluster, which both write); message_full, message_empty: P and the
// row factors, score -> value; q_full, q_empty: piece and query tail, load -> score. The list of
// pieces has kPieceSlots entries: load is at most one piece ahead of score, and score at most two
// messages ahead of value, each piece being at least one message.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <string>

#include "combine.h"
#include "ffi.h"
#include "mla.cuh"
#include "sm90/fragment.cuh"
#include "sm90/tma.cuh"
#include "softmax.cuh"
#include "tensor_map.h"

namespace jax_flashmla {
namespace {

using namespace sm90;  // NOLINT: the PTX layer is this file's instruction set

constexpr const char* kOp = "flash_mla_with_kvcache";
constexpr int kMinPage = 16, kMaxPage = 256;  // page_block_size

constexpr int kChunkColumns = 64;
constexpr int kChunks = kHeadDimK / kChunkColumns;  // of a tile; the last one is rope
constexpr int kHalfChunks = kHeadDimV / kChunkColumns / 2;
constexpr int kRegisterChunks = 6;  // chunks of Q that score keeps in registers
constexpr int kTailChunks = kChunks - kRegisterChunks;

constexpr int kValueSlots = 5;  // half tiles of V columns in shared memory
constexpr int kRopeSlots = 3;
constexpr int kMessageSlots = 2;
constexpr int kPieceSlots = 4;

constexpr int kValueWarpgroups = 2;
constexpr int kScoreWarpgroup = 2, kLoadWarpgroup = 3;
constexpr int kThreads = 4 * kWarpgroupSize;
constexpr int kWarpsPerWarpgroup = 4;
// Registers a thread: 2 * kValue + kScore + kLoad = 65536 / 128.
constexpr int kValueRegisters = 160, kScoreRegisters = 168, kLoadRegisters = 24;
static_assert(2 * kValueRegisters + kScoreRegisters + kLoadRegisters == 65536 / kWarpgroupSize);

// Score announces P(n) after this many chunks of S(n+1); the rest hides the handover.
constexpr int kAnnounceAfterChunk = 7;

// A run of key tiles of one request.
struct Piece {
  int32_t request;
  int32_t length;      // keys of the request
  int32_t first_tile;  // of this piece
  int32_t num_tiles;   // may be 0
  int32_t slot;        // of the partial result; -1: the request is not split
  int32_t invalid;     // a page id outside the pool, or a length beyond the table
};

template <typename T>
struct SharedMemoryPlan {
  SmemTile<T> v[kValueSlots][kHalfChunks];
  SmemTile<T> rope[kRopeSlots];
  SmemTile<T> q_tail[kTailChunks];
  SmemTile<T> p[kMessageSlots];
  float row_factor[kMessageSlots][kTileRows];
  Piece pieces[kPieceSlots];
  Barrier v_full[kValueSlots][kHalfChunks], v_empty[kValueSlots];
  Barrier rope_full[kRopeSlots], rope_empty[kRopeSlots];
  Barrier message_full[kMessageSlots], message_empty[kMessageSlots];
  Barrier q_full, q_empty;
};
static_assert(sizeof(SharedMemoryPlan<__half>) <= 227 * 1024);

struct DecodeParams {
  const int32_t* block_table;    // [b, max_blocks]
  const int32_t* cache_seqlens;  // [b]
  TileSchedule schedule;
  void* out;           // [b, h_kv, rows, d_v]
  float* lse;          // [b, h_q, s_q]
  float* o_partial;    // [2 * num_parts, h_kv, rows, d_v]
  float* lse_partial;  // [2 * num_parts, h_kv, rows], base 2
  int32_t batch, num_kv_heads, rows, group, s_q, row_tiles;
  int32_t num_blocks, max_blocks, page_shift;  // page_block_size = 1 << page_shift
  float scale_log2;                            // softmax_scale * log2(e)
  bool causal;
};

// What one block does.
struct BlockWork {
  int part, kv_head, row_tile;
  PartBound begin, end;

  __device__ __forceinline__ BlockWork(const DecodeParams& params) {
    row_tile = blockIdx.x % params.row_tiles;
    kv_head = blockIdx.x / params.row_tiles % params.num_kv_heads;
    part = blockIdx.x / params.row_tiles / params.num_kv_heads;
    begin = params.schedule.part_bounds[part];
    end = params.schedule.part_bounds[part + 1];
  }
  __device__ __forceinline__ int NumPieces() const {
    return end.request - begin.request + (end.tile > 0 ? 1 : 0);
  }
};

// Position in a ring of buffers, with the parity of its current round.
template <int kSlots>
struct RingCursor {
  int slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void Advance(int by = 1) {
    slot += by;
    if (slot >= kSlots) {
      slot -= kSlots;
      parity ^= 1;
    }
  }
};

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

// ------------------------------------------------------------------------------------------ load

// The page ids of one sequence, read ahead by 32 entries at a time, one a lane.
class PageIds {
 public:
  __device__ __forceinline__ PageIds(const int32_t* row, int max_blocks, int first)
      : row_(row), max_blocks_(max_blocks), base_(first) {
    current_ = Read(base_);
    next_ = Read(base_ + kWarpSize);
  }
  // Entry `index`; indexes never decrease. All lanes call.
  __device__ __forceinline__ int Get(int index) {
    if (index >= base_ + kWarpSize) {
      base_ += kWarpSize;
      current_ = next_;
      next_ = Read(base_ + kWarpSize);
    }
    return __shfl_sync(kFullWarp, current_, index - base_);
  }

 private:
  __device__ __forceinline__ int Read(int first) const {
    const int index = first + threadIdx.x % kWarpSize;
    return index < max_blocks_ ? __ldg(row_ + index) : -1;
  }

  const int32_t* row_;
  int max_blocks_, base_, current_, next_;
};

__device__ __forceinline__ Piece MakePiece(const DecodeParams& params, const BlockWork& work,
                                           int index) {
  const TileSchedule& schedule = params.schedule;
  Piece piece;
  piece.request = work.begin.request + index;
  const int64_t capacity = int64_t{params.max_blocks} << params.page_shift;
  const int length = __ldg(params.cache_seqlens + piece.request);
  const int splits =
      __ldg(schedule.num_splits + piece.request + 1) - __ldg(schedule.num_splits + piece.request);
  piece.invalid = length > capacity;
  piece.length = piece.invalid ? static_cast<int>(capacity) : max(length, 0);
  const int tiles = piece.length / kTileTokens + (piece.length % kTileTokens != 0);
  const int first = index == 0 ? work.begin.tile : 0;
  const int split = first == 0 ? 0 : work.part - __ldg(schedule.first_part + piece.request);
  // The last split runs to the actual length, whatever the schedule was made for.
  const int last = split == splits - 1 ? tiles : min(work.end.tile, tiles);
  piece.first_tile = min(first, tiles);
  piece.num_tiles = max(last - piece.first_tile, 0);
  piece.slot = splits == 1 ? -1 : PartialSlot(work.part, split);
  return piece;
}

// A tile's place in the cache: one box where pages hold whole tiles, else one a page.
struct TileSource {
  static constexpr int kMaxBoxes = 4;
  int page[kMaxBoxes];
  int boxes, row;
};

template <typename T, int kClusterSize>
class Loader {
 public:
  __device__ __forceinline__ Loader(SharedMemoryPlan<T>& smem, const CUtensorMap& q_map,
                                    const CUtensorMap& k_map, const DecodeParams& params)
      : smem_(smem), q_map_(q_map), k_map_(k_map), params_(params) {
    leader_ = threadIdx.x % kWarpSize == 0;
    if constexpr (kClusterSize > 1) turn_ = ClusterRank();
  }

  __device__ __forceinline__ void Run() {
    const BlockWork work(params_);
    const int num_pieces = work.NumPieces();
    for (int i = 0; i < num_pieces; ++i) {
      const Piece piece = MakePiece(params_, work, i);
      Wait(&smem_.q_empty, (i & 1) ^ 1);
      Piece& shared = smem_.pieces[i % kPieceSlots];
      if (leader_) {
        shared = piece;
        ArriveExpectBytes(&smem_.q_full, piece.num_tiles ? kTailChunks * SmemTile<T>::kBytes : 0);
      }
      if (piece.num_tiles == 0) continue;
      LoadQueries(work, piece);
      LoadTiles(work, piece, &shared.invalid);
    }
  }

 private:
  // The query chunks that score moves to registers pass through two half-tile slots.
  __device__ __forceinline__ void LoadQueries(const BlockWork& work, const Piece& piece) {
    const int row = work.row_tile * kTileRows;
    if (leader_) {
      for (int c = 0; c < kTailChunks; ++c) {
        TmaLoad4d(&smem_.q_tail[c], &q_map_, &smem_.q_full, (kRegisterChunks + c) * kChunkColumns,
                  row, work.kv_head, piece.request);
      }
    }
    for (int half = 0; half < 2; ++half) {
      Wait(&smem_.v_empty[v_.slot], v_.parity ^ 1);
      if (leader_) {
        for (int c = 0; c < kHalfChunks; ++c) {
          Barrier* full = &smem_.v_full[v_.slot][c];
          const int chunk = half * kHalfChunks + c;
          if (chunk < kRegisterChunks) {
            ArriveExpectBytes(full, SmemTile<T>::kBytes);
            TmaLoad4d(&smem_.v[v_.slot][c], &q_map_, full, chunk * kChunkColumns, row, work.kv_head,
                      piece.request);
          } else {
            Arrive(full);  // keeps the phases of a slot's chunks in step
          }
        }
      }
      v_.Advance();
    }
  }

  __device__ __forceinline__ void LoadTiles(const BlockWork& work, const Piece& piece,
                                            int32_t* invalid) {
    const int32_t* row =
        params_.block_table + static_cast<int64_t>(piece.request) * params_.max_blocks;
    PageIds pages(row, params_.max_blocks,
                  static_cast<int>(int64_t{piece.first_tile} * kTileTokens >> params_.page_shift));
    for (int t = piece.first_tile; t < piece.first_tile + piece.num_tiles; ++t) {
      const TileSource source = Locate(pages, t, piece.length, invalid);
      Wait(&smem_.rope_empty[rope_.slot], rope_.parity ^ 1);
      LoadChunk(&smem_.rope[rope_.slot], &smem_.rope_full[rope_.slot], kChunks - 1, work, source);
      rope_.Advance();
      for (int half = 0; half < 2; ++half) {
        Wait(&smem_.v_empty[v_.slot], v_.parity ^ 1);
        for (int c = 0; c < kHalfChunks; ++c) {
          LoadChunk(&smem_.v[v_.slot][c], &smem_.v_full[v_.slot][c], half * kHalfChunks + c, work,
                    source);
        }
        v_.Advance();
      }
    }
  }

  // Pages that the sequence does not need, and invalid ids, become page -1, which loads zeros.
  __device__ __forceinline__ TileSource Locate(PageIds& pages, int tile, int length,
                                               int32_t* invalid) {
    const int token = tile * kTileTokens;
    const int page_size = 1 << params_.page_shift;
    TileSource source;
    source.row = token & (page_size - 1);
    source.boxes = max(1, kTileTokens >> params_.page_shift);
#pragma unroll
    for (int j = 0; j < TileSource::kMaxBoxes; ++j) {
      if (j >= source.boxes) break;
      const bool needed = token + j * page_size < length;
      int id = pages.Get((token >> params_.page_shift) + j);
      if (!needed) id = -1;
      if (id < 0 || id >= params_.num_blocks) {
        id = -1;
        if (needed && leader_) *invalid = 1;
      }
      source.page[j] = id;
    }
    return source;
  }

  __device__ __forceinline__ void LoadChunk(SmemTile<T>* tile, Barrier* full, int chunk,
                                            const BlockWork& work, const TileSource& source) {
    const bool mine = kClusterSize == 1 || (turn_++ & 1) == 0;
    if (!leader_) return;
    ArriveExpectBytes(full, SmemTile<T>::kBytes);
    if (!mine) return;
#pragma unroll
    for (int j = 0; j < TileSource::kMaxBoxes; ++j) {
      if (j >= source.boxes) break;
      T* destination = tile->data + (j * SmemTile<T>::kColumns << params_.page_shift);
      if constexpr (kClusterSize == 1) {
        TmaLoad4d(destination, &k_map_, full, chunk * kChunkColumns, work.kv_head, source.row,
                  source.page[j]);
      } else {
        TmaLoadMulticast4d(destination, &k_map_, full, (1 << kClusterSize) - 1,
                           chunk * kChunkColumns, work.kv_head, source.row, source.page[j]);
      }
    }
  }

  SharedMemoryPlan<T>& smem_;
  const CUtensorMap &q_map_, &k_map_;
  const DecodeParams& params_;
  bool leader_;
  uint32_t turn_ = 0;
  RingCursor<kValueSlots> v_;
  RingCursor<kRopeSlots> rope_;
};

// ----------------------------------------------------------------------------------------- score

template <typename T, int kClusterSize>
class Scorer {
 public:
  __device__ __forceinline__ Scorer(SharedMemoryPlan<T>& smem, const DecodeParams& params)
      : smem_(smem), params_(params) {}

  __device__ __forceinline__ void Run() {
    const BlockWork work(params_);
    const int num_pieces = work.NumPieces();
    const int first_row = work.row_tile * kTileRows;
    for (int i = 0; i < num_pieces; ++i) {
      Wait(&smem_.q_full, i & 1);
      const int num_tiles = smem_.pieces[i % kPieceSlots].num_tiles;
      const int first_tile = smem_.pieces[i % kPieceSlots].first_tile;
      const int length = smem_.pieces[i % kPieceSlots].length;
      const int visible[2] = {VisibleKeys(first_row + FragmentRow(), length),
                              VisibleKeys(first_row + FragmentRow() + 8, length)};
      const int all_visible = VisibleKeys(first_row, length);
      OnlineSoftmax softmax;
      if (num_tiles > 0) LoadQueries();
      for (int t = first_tile; t < first_tile + num_tiles; ++t) {
        float scores[32];
        MultiplyQueriesAndKeys(scores);
        if (t == first_tile + num_tiles - 1) Release<1>(&smem_.q_empty);
        if ((t + 1) * kTileTokens > all_visible) {
          MaskFrom(scores, visible[0] - t * kTileTokens, visible[1] - t * kTileTokens);
        }
        float factor[2];
        softmax.Update(scores, params_.scale_log2, factor);
        Wait(&smem_.message_empty[message_.slot], message_.parity ^ 1);
        WriteFactors(factor);
#pragma unroll
        for (int k = 0; k < 4; ++k) StoreFragment(smem_.p[message_.slot], scores, k);
        FenceAsyncProxy();
        __syncwarp();
        announce_ = true;
        message_.Advance();
      }
      if (num_tiles == 0) Release<1>(&smem_.q_empty);
      Announce();
      Finish(work, smem_.pieces[i % kPieceSlots], softmax);
    }
  }

 private:
  // Keys that query row `row` sees: the first ones, up to the bottom-right aligned diagonal.
  __device__ __forceinline__ int VisibleKeys(int row, int length) const {
    if (!params_.causal) return length;
    return min(length, max(0, length - params_.s_q + row / params_.group + 1));
  }

  __device__ __forceinline__ void LoadQueries() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int c = 0; c < kHalfChunks; ++c) {
        const int chunk = half * kHalfChunks + c;
        if (chunk >= kRegisterChunks) break;
        Wait(&smem_.v_full[v_.slot][c], v_.parity);
#pragma unroll
        for (int k = 0; k < 4; ++k) LoadFragmentA(q_[chunk][k], smem_.v[v_.slot][c], k);
      }
      Release<kClusterSize>(&smem_.v_empty[v_.slot]);
      v_.Advance();
    }
  }

  // Tells value that the last P is there, if that has not been done.
  __device__ __forceinline__ void Announce() {
    if (announce_ && threadIdx.x % kWarpSize == 0) Arrive(&smem_.message_full[message_.slot ^ 1]);
    announce_ = false;
  }

  // Waits for a chunk of keys; if that takes time, value goes first.
  __device__ __forceinline__ void WaitForKeys(Barrier* full, uint32_t parity) {
    if (TestWait(full, parity)) return;
    Announce();
    Wait(full, parity);
  }

  // S = Q K^T of the next tile in the ring.
  __device__ __forceinline__ void MultiplyQueriesAndKeys(float (&scores)[32]) {
    constexpr int kSteps = 4;  // of 16 columns in a chunk
    constexpr uint64_t kStep = SmemTile<T>::kStepAlongColumns;
    WgmmaFence();
    WaitForKeys(&smem_.rope_full[rope_.slot], rope_.parity);
    {
      const uint64_t a = smem_.q_tail[kTailChunks - 1].DescriptorAlongColumns();
      const uint64_t b = smem_.rope[rope_.slot].DescriptorAlongColumns();
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        WgmmaM64N64<T>(scores, a + k * kStep, b + k * kStep, k > 0);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int c = 0; c < kHalfChunks; ++c) {
        const int chunk = half * kHalfChunks + c;
        WaitForKeys(&smem_.v_full[v_.slot][c], v_.parity);
        const uint64_t b = smem_.v[v_.slot][c].DescriptorAlongColumns();
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          if (chunk < kRegisterChunks) {
            WgmmaM64N64RegA<T>(scores, q_[chunk][k], b + k * kStep, 1);
          } else {
            const uint64_t a = smem_.q_tail[chunk - kRegisterChunks].DescriptorAlongColumns();
            WgmmaM64N64<T>(scores, a + k * kStep, b + k * kStep, 1);
          }
        }
        if (chunk + 2 == kAnnounceAfterChunk) Announce();
      }
      v_.Advance();
    }
    WgmmaCommit();
    Announce();
    WgmmaWait<0>();
    KeepInRegisters(scores);
    Release<kClusterSize>(&smem_.rope_empty[rope_.slot]);
    rope_.Advance();
  }

  // The first lane of each quad writes the factors of its two rows.
  __device__ __forceinline__ void WriteFactors(const float (&factor)[2]) {
    if (threadIdx.x % 4 != 0) return;
    smem_.row_factor[message_.slot][FragmentRow()] = factor[0];
    smem_.row_factor[message_.slot][FragmentRow() + 8] = factor[1];
  }

  // The last message of a piece: what O must be multiplied with. Writes the log-sum-exp.
  __device__ __forceinline__ void Finish(const BlockWork& work, const Piece& piece,
                                         const OnlineSoftmax& softmax) {
    float factor[2], lse2[2];
    softmax.Finish(factor, lse2);
    if (piece.invalid) {
      factor[0] = factor[1] = lse2[0] = lse2[1] = NAN;
    }
    Wait(&smem_.message_empty[message_.slot], message_.parity ^ 1);
    WriteFactors(factor);
    __syncwarp();
    announce_ = true;
    message_.Advance();
    Announce();
    if (threadIdx.x % 4 != 0) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = work.row_tile * kTileRows + FragmentRow() + 8 * i;
      if (row >= params_.rows) break;
      if (piece.slot >= 0) {
        const int64_t base = static_cast<int64_t>(piece.slot) * params_.num_kv_heads + work.kv_head;
        params_.lse_partial[base * params_.rows + row] = lse2[i];
      } else {
        const int64_t head =
            (static_cast<int64_t>(piece.request) * params_.num_kv_heads + work.kv_head) *
                params_.group +
            row % params_.group;
        params_.lse[head * params_.s_q + row / params_.group] = NaturalLse(lse2[i]);
      }
    }
  }

  SharedMemoryPlan<T>& smem_;
  const DecodeParams& params_;
  uint32_t q_[kRegisterChunks][4][4];
  bool announce_ = false;
  RingCursor<kValueSlots> v_;
  RingCursor<kRopeSlots> rope_;
  RingCursor<kMessageSlots> message_;
};

// ----------------------------------------------------------------------------------------- value

template <typename T, int kClusterSize>
class ValueAccumulator {
 public:
  __device__ __forceinline__ ValueAccumulator(SharedMemoryPlan<T>& smem, const DecodeParams& params,
                                              int half)
      : smem_(smem), params_(params), half_(half) {
    v_.Advance(half);
  }

  __device__ __forceinline__ void Run() {
    const BlockWork work(params_);
    const int num_pieces = work.NumPieces();
    for (int i = 0; i < num_pieces; ++i) {
      Wait(&smem_.message_full[message_.slot], message_.parity);
      const Piece& piece = smem_.pieces[i % kPieceSlots];
      const int num_tiles = piece.num_tiles;
      if (num_tiles > 0) v_.Advance(2);  // the queries' slots
      Clear();
      for (int t = 0; t < num_tiles; ++t) {
        Rescale();
        const int valid = piece.length - (piece.first_tile + t) * kTileTokens;
        for (int c = 0; c < kHalfChunks; ++c) Wait(&smem_.v_full[v_.slot][c], v_.parity);
        if (valid < kTileTokens) ClearRowsFrom(valid);
        MultiplyAndAdd();
        ReleaseMessage();
        Release<kClusterSize>(&smem_.v_empty[v_.slot]);
        v_.Advance(2);
        Wait(&smem_.message_full[message_.slot], message_.parity);
      }
      const float factor[2] = {smem_.row_factor[message_.slot][FragmentRow()],
                               smem_.row_factor[message_.slot][FragmentRow() + 8]};
      Write(work, piece, factor);
      ReleaseMessage();
    }
  }

 private:
  static constexpr int kColumns = kHeadDimV / kValueWarpgroups;
  static constexpr int kBlockColumns = 128;  // of one multiply
  static constexpr int kBlocks = kColumns / kBlockColumns;
  static constexpr int kAccumulators = kTileRows * kBlockColumns / kWarpgroupSize;

  __device__ __forceinline__ void ReleaseMessage() {
    Release<1>(&smem_.message_empty[message_.slot]);
    message_.Advance();
  }

  __device__ __forceinline__ void Clear() {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int j = 0; j < kAccumulators; ++j) o_[n][j] = 0.f;
    }
  }

  __device__ __forceinline__ void Rescale() {
    const float top = smem_.row_factor[message_.slot][FragmentRow()];
    const float bottom = smem_.row_factor[message_.slot][FragmentRow() + 8];
    if (!__any_sync(kFullWarp, top != 1.f || bottom != 1.f)) return;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int j = 0; j < kAccumulators; j += 4) {
        o_[n][j] *= top;
        o_[n][j + 1] *= top;
        o_[n][j + 2] *= bottom;
        o_[n][j + 3] *= bottom;
      }
    }
  }

  // Slots of the last page past the sequence's end may hold NaN, and 0 * NaN is NaN.
  __device__ __forceinline__ void ClearRowsFrom(int row) {
    const int units = (kTileTokens - row) * SmemTile<T>::kUnitsPerRow;
    for (int c = 0; c < kHalfChunks; ++c) {
      uint4* rows =
          reinterpret_cast<uint4*>(smem_.v[v_.slot][c].data) + row * SmemTile<T>::kUnitsPerRow;
      for (int i = threadIdx.x % kWarpgroupSize; i < units; i += kWarpgroupSize) {
        rows[i] = make_uint4(0, 0, 0, 0);
      }
    }
    FenceAsyncProxy();
    NamedBarrierSync(1 + half_, kWarpgroupSize);
  }

  __device__ __forceinline__ void MultiplyAndAdd() {
    const uint64_t a = smem_.p[message_.slot].DescriptorAlongColumns();
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) KeepInRegisters(o_[n]);
    WgmmaFence();
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      const uint64_t b = smem_.v[v_.slot][n * kBlockColumns / kChunkColumns].DescriptorAlongRows();
#pragma unroll
      for (int k = 0; k < kTileTokens / 16; ++k) {
        WgmmaM64N128TransposedB<T>(o_[n], a + k * SmemTile<T>::kStepAlongColumns,
                                   b + k * SmemTile<T>::kStepAlongRows, 1);
      }
    }
    WgmmaCommit();
    WgmmaWait<0>();
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) KeepInRegisters(o_[n]);
  }

  __device__ __forceinline__ void Write(const BlockWork& work, const Piece& piece,
                                        const float (&factor)[2]) {
    const bool split = piece.slot >= 0;
    const int64_t head =
        static_cast<int64_t>(split ? piece.slot : piece.request) * params_.num_kv_heads +
        work.kv_head;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = work.row_tile * kTileRows + FragmentRow() + 8 * i;
      const int64_t offset = (head * params_.rows + row) * kHeadDimV + half_ * kColumns;
      if (split) {
        WritePartialRow(params_.o_partial + offset, i, factor[i], row < params_.rows);
      } else {
        WriteRow(static_cast<T*>(params_.out) + offset, i, factor[i], row < params_.rows);
      }
    }
  }

  // A quad holds 2 neighbouring columns a lane in each group of 8; a transpose makes that 8, so
  // that each lane stores 16 bytes and a quad 64 in a row.
  __device__ __forceinline__ void WriteRow(T* row, int i, float factor, bool store) {
#pragma unroll
    for (int j = 0; j < kColumns / 32; ++j) {
      uint32_t words[4];
#pragma unroll
      for (int g = 0; g < 4; ++g) {
        const float* e = Element(4 * j + g, i);
        words[g] = Pack<T>(e[0] * factor, e[1] * factor);
      }
      QuadTranspose(words);
      if (store) {
        *reinterpret_cast<uint4*>(row + 32 * j + threadIdx.x % 4 * 8) =
            make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }

  // The two elements of row `i` (of this thread's two) in group `j` of 8 columns.
  __device__ __forceinline__ const float* Element(int j, int i) const {
    return &o_[8 * j / kBlockColumns][4 * (j % (kBlockColumns / 8)) + 2 * i];
  }

  __device__ __forceinline__ void WritePartialRow(float* row, int i, float factor, bool store) {
    if (!store) return;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      const float* e = Element(j, i);
      *reinterpret_cast<float2*>(row + 8 * j + FragmentColumn()) =
          make_float2(e[0] * factor, e[1] * factor);
    }
  }

  SharedMemoryPlan<T>& smem_;
  const DecodeParams& params_;
  const int half_;
  float o_[kBlocks][kAccumulators];
  RingCursor<kValueSlots> v_;
  RingCursor<kMessageSlots> message_;
};

// ---------------------------------------------------------------------------------------- kernel

template <typename T, int kClusterSize>
__device__ __forceinline__ void InitBarriers(SharedMemoryPlan<T>& smem) {
  for (int i = 0; i < kValueSlots; ++i) {
    for (int c = 0; c < kHalfChunks; ++c) BarrierInit(&smem.v_full[i][c], 1);
    BarrierInit(&smem.v_empty[i], kWarpsPerWarpgroup * kClusterSize);
  }
  for (int i = 0; i < kRopeSlots; ++i) {
    BarrierInit(&smem.rope_full[i], 1);
    BarrierInit(&smem.rope_empty[i], kWarpsPerWarpgroup * kClusterSize);
  }
  for (int i = 0; i < kMessageSlots; ++i) {
    BarrierInit(&smem.message_full[i], kWarpsPerWarpgroup);
    BarrierInit(&smem.message_empty[i], kWarpsPerWarpgroup * kValueWarpgroups);
  }
  BarrierInit(&smem.q_full, 1);
  BarrierInit(&smem.q_empty, kWarpsPerWarpgroup);
  FenceBarrierInit();
}

template <typename T, int kClusterSize>
__global__ void __launch_bounds__(kThreads, 1)
    DenseDecodeKernel(const __grid_constant__ CUtensorMap q_map,
                      const __grid_constant__ CUtensorMap k_map,
                      const __grid_constant__ DecodeParams params) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  auto& smem = *reinterpret_cast<SharedMemoryPlan<T>*>(shared_memory);
  if (threadIdx.x == 0) InitBarriers<T, kClusterSize>(smem);
  if constexpr (kClusterSize > 1) {
    ClusterSync();
  } else {
    __syncthreads();
  }
  AllowNextKernel();
  WaitForPriorKernels();

  const int warpgroup = WarpUniform(threadIdx.x / kWarpgroupSize);
  if (warpgroup == kLoadWarpgroup) {
    ShrinkRegisters<kLoadRegisters>();
    if (WarpUniform(threadIdx.x / kWarpSize) % kWarpsPerWarpgroup == 0) {
      Loader<T, kClusterSize>(smem, q_map, k_map, params).Run();
    }
  } else if (warpgroup == kScoreWarpgroup) {
    GrowRegisters<kScoreRegisters>();
    Scorer<T, kClusterSize>(smem, params).Run();
  } else {
    GrowRegisters<kValueRegisters>();
    ValueAccumulator<T, kClusterSize>(smem, params, warpgroup).Run();
  }
  // No block of a cluster may leave while another one still writes to its memory.
  if constexpr (kClusterSize > 1) ClusterSync();
}

template <typename T, int kClusterSize>
ffi::Error LaunchDecode(const CUtensorMap& q_map, const CUtensorMap& k_map,
                        const DecodeParams& params, cudaStream_t stream) {
  const int64_t blocks =
      int64_t{params.schedule.num_parts} * params.num_kv_heads * params.row_tiles;
  JAX_FLASHMLA_CHECK(CheckGrid(kOp, blocks));
  return LaunchOverlapped(kOp, stream,
                          {.grid = dim3(blocks),
                           .block = kThreads,
                           .shared_bytes = sizeof(SharedMemoryPlan<T>),
                           .cluster = kClusterSize},
                          DenseDecodeKernel<T, kClusterSize>, q_map, k_map, params);
}

template <typename T>
ffi::Error Launch(const CUtensorMap& q_map, const CUtensorMap& k_map, const DecodeParams& params,
                  cudaStream_t stream) {
  JAX_FLASHMLA_CHECK(params.row_tiles % 2 == 0
                         ? (LaunchDecode<T, 2>(q_map, k_map, params, stream))
                         : (LaunchDecode<T, 1>(q_map, k_map, params, stream)));
  return LaunchCombine<T>({.schedule = params.schedule,
                           .o_partial = params.o_partial,
                           .lse_partial = params.lse_partial,
                           .out = params.out,
                           .lse = params.lse,
                           .batch = params.batch,
                           .num_kv_heads = params.num_kv_heads,
                           .rows = params.rows,
                           .group = params.group,
                           .s_q = params.s_q},
                          stream);
}

// --------------------------------------------------------------------------------------- handler

// Tensor maps of q [b, h_kv, rows, d_k] and k_cache [num_blocks, page_block_size, h_kv, d_k].
ffi::Error EncodeMaps(ffi::AnyBuffer q, ffi::AnyBuffer k_cache, CUtensorMap* q_map,
                      CUtensorMap* k_map) {
  const auto type = q.element_type() == ffi::DataType::BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                            : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const auto shape = [](Dims dims) {
    return std::array<uint64_t, 4>{static_cast<uint64_t>(dims[3]), static_cast<uint64_t>(dims[2]),
                                   static_cast<uint64_t>(dims[1]), static_cast<uint64_t>(dims[0])};
  };
  JAX_FLASHMLA_CHECK(EncodeTensorMap({.data = q.untyped_data(),
                                      .type = type,
                                      .shape = shape(q.dimensions()),
                                      .box = {kChunkColumns, kTileRows, 1, 1}},
                                     q_map));
  std::array<uint64_t, 4> k_shape = shape(k_cache.dimensions());
  const void* k_data = k_cache.untyped_data();
  if (k_shape[3] == 0) {  // an empty pool: every page is outside of it, and nothing is read
    k_shape[3] = 1;
    k_data = q.untyped_data();
  }
  const auto page = static_cast<uint32_t>(std::min<uint64_t>(k_shape[2], kTileTokens));
  return EncodeTensorMap(
      {.data = k_data, .type = type, .shape = k_shape, .box = {kChunkColumns, 1, page, 1}}, k_map);
}

ffi::Error CheckOperands(ffi::AnyBuffer q, ffi::AnyBuffer k_cache) {
  JAX_FLASHMLA_CHECK(CheckArgument(
      q.element_type() == ffi::DataType::BF16 || q.element_type() == ffi::DataType::F16, kOp,
      "q must be bf16 or fp16"));
  JAX_FLASHMLA_CHECK(CheckArgument(q.element_type() == k_cache.element_type(), kOp,
                                   "q and k_cache must have one dtype"));
  const Dims q_dims = q.dimensions(), k_dims = k_cache.dimensions();
  JAX_FLASHMLA_CHECK(CheckArgument(q_dims.size() == 4 && k_dims.size() == 4, kOp,
                                   "q and k_cache must have rank 4"));
  JAX_FLASHMLA_CHECK(CheckShape(kOp, "q", q_dims, {q_dims[0], k_dims[2], q_dims[2], kHeadDimK}));
  JAX_FLASHMLA_CHECK(
      CheckShape(kOp, "k_cache", k_dims, {k_dims[0], k_dims[1], k_dims[2], kHeadDimK}));
  const int64_t page = k_dims[1];
  JAX_FLASHMLA_CHECK(
      CheckArgument(page >= kMinPage && page <= kMaxPage && (page & (page - 1)) == 0, kOp,
                    "page_block_size must be 16, 32, 64, 128 or 256, got " + std::to_string(page)));
  const int64_t largest = std::max({q_dims[0], q_dims[2], k_dims[0]});
  return CheckArgument(largest <= std::numeric_limits<int32_t>::max() / 2, kOp,
                       "an axis of q or k_cache is too long: " + std::to_string(largest));
}

ffi::Error DenseDecodeImpl(cudaStream_t stream, int32_t device, ffi::AnyBuffer q,
                           ffi::AnyBuffer k_cache, I32<2> block_table, I32<1> cache_seqlens,
                           I32<2> part_bounds, I32<1> first_part, I32<1> num_splits,
                           ffi::Result<ffi::AnyBuffer> out, F32Result<3> lse,
                           F32Result<4> o_partial, F32Result<3> lse_partial, float softmax_scale,
                           bool causal) {
  JAX_FLASHMLA_CHECK(CheckOperands(q, k_cache));
  const Dims q_dims = q.dimensions(), k_dims = k_cache.dimensions();
  const int64_t batch = q_dims[0], kv_heads = q_dims[1], rows = q_dims[2];
  if (batch == 0) return ffi::Error::Success();
  JAX_FLASHMLA_CHECK(CheckDevice(kOp, device));
  const int64_t num_parts = part_bounds.dimensions()[0] - 1;
  const int64_t max_blocks = block_table.dimensions()[1], s_q = lse->dimensions()[2];
  JAX_FLASHMLA_CHECK(CheckArgument(num_parts >= 1, kOp, "there must be an SM part"));
  JAX_FLASHMLA_CHECK(
      CheckArgument(s_q >= 1 && rows % s_q == 0, kOp, "the rows of q must be a multiple of s_q"));
  JAX_FLASHMLA_CHECK(CheckShape(kOp, "block_table", block_table.dimensions(), {batch, max_blocks}));
  JAX_FLASHMLA_CHECK(CheckShape(kOp, "cache_seqlens", cache_seqlens.dimensions(), {batch}));
  JAX_FLASHMLA_CHECK(CheckShape(kOp, "part_bounds", part_bounds.dimensions(), {num_parts + 1, 2}));
  JAX_FLASHMLA_CHECK(CheckShape(kOp, "first_part", first_part.dimensions(), {batch}));
  JAX_FLASHMLA_CHECK(CheckShape(kOp, "num_splits", num_splits.dimensions(), {batch + 1}));
  JAX_FLASHMLA_CHECK(CheckShape(kOp, "out", out->dimensions(), {batch, kv_heads, rows, kHeadDimV}));
  JAX_FLASHMLA_CHECK(
      CheckShape(kOp, "softmax_lse", lse->dimensions(), {batch, kv_heads * (rows / s_q), s_q}));
  JAX_FLASHMLA_CHECK(CheckShape(kOp, "o_partial", o_partial->dimensions(),
                                {2 * num_parts, kv_heads, rows, kHeadDimV}));
  JAX_FLASHMLA_CHECK(
      CheckShape(kOp, "lse_partial", lse_partial->dimensions(), {2 * num_parts, kv_heads, rows}));

  CUtensorMap q_map, k_map;
  JAX_FLASHMLA_CHECK(EncodeMaps(q, k_cache, &q_map, &k_map));
  const DecodeParams params = {
      .block_table = block_table.typed_data(),
      .cache_seqlens = cache_seqlens.typed_data(),
      .schedule = {.part_bounds = reinterpret_cast<const PartBound*>(part_bounds.typed_data()),
                   .first_part = first_part.typed_data(),
                   .num_splits = num_splits.typed_data(),
                   .num_parts = static_cast<int32_t>(num_parts)},
      .out = out->untyped_data(),
      .lse = lse->typed_data(),
      .o_partial = o_partial->typed_data(),
      .lse_partial = lse_partial->typed_data(),
      .batch = static_cast<int32_t>(batch),
      .num_kv_heads = static_cast<int32_t>(kv_heads),
      .rows = static_cast<int32_t>(rows),
      .group = static_cast<int32_t>(rows / s_q),
      .s_q = static_cast<int32_t>(s_q),
      .row_tiles = static_cast<int32_t>(CeilDiv<int64_t>(rows, kTileRows)),
      .num_blocks = static_cast<int32_t>(k_dims[0]),
      .max_blocks = static_cast<int32_t>(max_blocks),
      .page_shift = std::countr_zero(static_cast<uint64_t>(k_dims[1])),
      .scale_log2 = softmax_scale * kLog2e,
      .causal = causal,
  };
  return q.element_type() == ffi::DataType::BF16
             ? Launch<__nv_bfloat16>(q_map, k_map, params, stream)
             : Launch<__half>(q_map, k_map, params, stream);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(DenseDecode, DenseDecodeImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<Stream>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<I32<2>>()
                                  .Arg<I32<1>>()
                                  .Arg<I32<2>>()
                                  .Arg<I32<1>>()
                                  .Arg<I32<1>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<F32<3>>()
                                  .Ret<F32<4>>()
                                  .Ret<F32<3>>()
                                  .Attr<float>("softmax_scale")
                                  .Attr<bool>("causal"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_flashmla
