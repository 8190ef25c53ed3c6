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
//   load    one warp plans: reads schedule, lengths and block table. One thread loads: fills a
//           ring of shared memory with quarter tiles of V columns (11 slots of 64 x 128), rope
//           columns (64 x 64) and, at the head of a piece, its queries. Both run ahead
//           of everything else, across requests.
//   score   holds 2/3 of Q in registers, S = Q K^T, softmax, writes P.
//   value   two warpgroups, each holding O for two quarters of the 512 columns: rescale,
//           O += P V, output.
//
//   tensor cores:  | S(n+1)      | O(n)        | S(n+2)      | O(n+1)      |
//   score          | S(n+1)      | softmax n+1 | S(n+2)      | softmax n+2 |
//   value 0, 1     | rescale     | O(n)        | rescale     | O(n+1)      |
//
// The score warpgroup announces P(n) when it has issued 3/4 of S(n+1), so that the tensor cores
// always have one product queued while softmax runs, and S does not have to share them for long:
// where value multiplies too, S gets a fifth of them. If the tile of S(n+1) has not arrived yet, it
// announces P(n) at once. Keeping Q in registers makes room for 2.75 tiles in flight and takes a
// sixth off the shared-memory traffic, which would be the limit otherwise.
//
// Where there is an even number of row tiles, two blocks form a cluster, work on the same piece
// and share its tiles: each loads every other chunk and multicasts it to both.
//
// Ordering. A ring of buffers has a full and an empty barrier a slot:
//   v, rope    load -> score (and value: v) -> load of both blocks of a cluster, as both write
//   q_tail     load -> score -> load
//   message    P and the row factors: score -> value -> score
//   pages      plan -> load -> plan
//   piece      plan -> load, score (value learns of it by the first message) -> value -> plan
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <optional>
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
constexpr int kQuarterChunks = kHeadDimV / kChunkColumns / 4;
constexpr int kQuarterColumns = kHeadDimV / 4;
constexpr int kRegisterChunks = 6;  // chunks of Q that score keeps in registers
constexpr int kTailChunks = kChunks - kRegisterChunks;
// The slots of V columns that they pass through.
constexpr int kQuerySlots = CeilDiv(kRegisterChunks, kQuarterChunks);

constexpr int kValueSlots = 11;  // quarters of a tile's V columns
constexpr int kRopeSlots = 1;    // it is needed last and free first
constexpr int kMessageSlots = 2;
constexpr int kPieceSlots = 4;
constexpr int kPageBatches = 4;  // of one page id a lane

constexpr int kValueWarpgroups = 2;
constexpr int kScoreWarpgroup = 2, kLoadWarpgroup = 3;
constexpr int kLoadWarp = 0, kPlanWarp = 1;  // of the load warpgroup
constexpr int kThreads = 4 * kWarpgroupSize;
constexpr int kWarpsPerWarpgroup = 4;
// Registers a thread: 2 * kValue + kScore + kLoad = 65536 / 128.
constexpr int kValueRegisters = 160, kScoreRegisters = 160, kLoadRegisters = 32;
static_assert(2 * kValueRegisters + kScoreRegisters + kLoadRegisters == 65536 / kWarpgroupSize);

// A run of key tiles of one request.
struct Piece {
  int32_t request;
  int32_t length;      // keys of the request
  int32_t first_tile;  // of this piece
  int32_t num_tiles;   // may be 0
  int32_t slot;        // of the partial result; -1: the request is not split
  int32_t invalid;     // a page id outside the pool, or a length beyond the table
  // Within [-length, s_q], beyond which it would change nothing.
  int32_t causal_offset;

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
  Piece pieces[kPieceSlots];
  int32_t pages[kPageBatches][kWarpSize];
  Barrier v_full[kValueSlots], v_empty[kValueSlots];
  Barrier rope_full[kRopeSlots], rope_empty[kRopeSlots];
  Barrier message_full[kMessageSlots], message_empty[kMessageSlots];
  Barrier piece_full[kPieceSlots], piece_empty[kPieceSlots];
  Barrier pages_full[kPageBatches], pages_empty[kPageBatches];
  Barrier q_full, q_empty;
};
static_assert(sizeof(SharedMemoryPlan<__half>) <= 227 * 1024);

struct DecodeParams {
  const int32_t* block_table;    // [b, max_blocks]
  const int32_t* cache_seqlens;  // [b]
  const int32_t* causal_offset;  // [b], or null
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

 private:
  int n_ = 0;
};

__device__ __forceinline__ bool IsFirstLane() { return threadIdx.x % kWarpSize == 0; }
// Of the four lanes that share two rows of a fragment.
__device__ __forceinline__ bool IsFirstOfQuad() { return threadIdx.x % 4 == 0; }

// Hides from the compiler what a value is computed from, so that it computes it where it is used
// instead of keeping it in a register through the loops: value has none to spare.
__device__ __forceinline__ int Opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

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

// ------------------------------------------------------------------------------------------ plan

// One warp, ahead of all others: reads the schedule, the lengths and the block table, so that
// nobody else waits for global memory to know what to do.
template <typename T>
class Planner {
 public:
  __device__ __forceinline__ Planner(SharedMemoryPlan<T>& smem, const DecodeParams& params)
      : smem_(smem), params_(params) {}

  __device__ __forceinline__ void Run(const BlockWork& work) {
    int request = work.begin.request, first_tile = work.begin.tile;
    for (int left = work.NumPieces(); left > 0; --left) {
      // Read beside the length, not after it: one step less until the first load.
      const int64_t first_page = int64_t{first_tile} * kTileTokens >> params_.page_shift;
      const int32_t first_id = PageOfLane(request, first_page);
      const Piece piece = MakePiece(work, request, first_tile);
      ++request;
      first_tile = 0;
      Wait(&smem_.piece_empty[piece_.Slot()], piece_.Parity() ^ 1);
      if (IsFirstLane()) {
        smem_.pieces[piece_.Slot()] = piece;
        Arrive(&smem_.piece_full[piece_.Slot()]);
      }
      __syncwarp();
      PlanPages(smem_.pieces[piece_.Slot()], first_id);
      piece_.Advance();
    }
  }

 private:
  __device__ __forceinline__ Piece MakePiece(const BlockWork& work, int request, int first) const {
    const TileSchedule& schedule = params_.schedule;
    Piece piece;
    piece.request = request;
    const int64_t capacity = int64_t{params_.max_blocks} << params_.page_shift;
    const int length = params_.cache_seqlens[piece.request];
    const int splits = schedule.num_splits[piece.request + 1] - schedule.num_splits[piece.request];
    piece.invalid = length > capacity;
    piece.length = piece.invalid ? static_cast<int>(capacity) : max(length, 0);
    piece.causal_offset = 0;
    if (params_.causal_offset != nullptr) {
      piece.causal_offset =
          min(max(params_.causal_offset[piece.request], -piece.length), params_.s_q);
    }
    const int tiles = piece.length / kTileTokens + (piece.length % kTileTokens != 0);
    const int split = first == 0 ? 0 : work.part - schedule.first_part[piece.request];
    // The last split runs to the actual length, whatever the schedule was made for.
    const int last = split == splits - 1 ? tiles : min(work.end.tile, tiles);
    piece.first_tile = min(first, tiles);
    piece.num_tiles = max(last - piece.first_tile, 0);
    piece.slot = splits == 1 ? -1 : PartialSlot(work.part, split);
    return piece;
  }

  // The block-table entry of page first + lane, -1 behind the table.
  __device__ __forceinline__ int32_t PageOfLane(int request, int64_t first) const {
    const int64_t page = first + threadIdx.x % kWarpSize;
    if (page >= params_.max_blocks) return -1;
    return params_.block_table[int64_t{request} * params_.max_blocks + page];
  }

  // Page ids in batches of one a lane, of which the first has been read. An id outside the pool
  // becomes -1, which loads zeros.
  __device__ __forceinline__ void PlanPages(Piece& piece, int32_t id) {
    const int lane = threadIdx.x % kWarpSize;
    const int first = piece.FirstPage(params_.page_shift);
    const int end = piece.EndPage(params_.page_shift);
    for (int page = first; page < end; page += kWarpSize) {
      if (page > first) id = PageOfLane(piece.request, page);
      const bool outside = page + lane < end && (id < 0 || id >= params_.num_blocks);
      if (outside || page + lane >= end) id = -1;
      const bool any_outside = __any_sync(kFullWarp, outside);
      Wait(&smem_.pages_empty[pages_.Slot()], pages_.Parity() ^ 1);
      smem_.pages[pages_.Slot()][lane] = id;
      if (any_outside && lane == 0) piece.invalid = 1;
      Arrive(&smem_.pages_full[pages_.Slot()]);
      pages_.Advance();
    }
  }

  SharedMemoryPlan<T>& smem_;
  const DecodeParams& params_;
  RingCursor<kPieceSlots> piece_;
  RingCursor<kPageBatches> pages_;
};

// ------------------------------------------------------------------------------------------ load

// One thread, which issues all copies.
template <typename T, int kClusterSize>
class Loader {
 public:
  __device__ __forceinline__ Loader(SharedMemoryPlan<T>& smem, const CUtensorMap& q_map,
                                    const CUtensorMap& k_map, const DecodeParams& params)
      : smem_(smem), q_map_(q_map), k_map_(k_map), params_(params) {
    if constexpr (kClusterSize > 1) turn_ = ClusterRank();
  }

  __device__ __forceinline__ void Run(const BlockWork& work) {
    kv_head_ = work.kv_head;
    const int num_pieces = work.NumPieces();
    for (int i = 0; i < num_pieces; ++i) {
      Wait(&smem_.piece_full[piece_.Slot()], piece_.Parity());
      LoadPiece(work, smem_.pieces[piece_.Slot()]);
      Arrive(&smem_.piece_empty[piece_.Slot()]);
      piece_.Advance();
    }
  }

 private:
  __device__ __forceinline__ void LoadPiece(const BlockWork& work, const Piece& piece) {
    if (piece.num_tiles == 0) return;
    // Pages that only this cluster reads, once, make room for the partial results of a split
    // request. Where nothing is split it is slower.
    const bool read_once = params_.row_tiles <= kClusterSize;
    policy_ = piece.slot >= 0 && read_once ? kEvictFirst : kEvictNormal;
    end_ = piece.first_tile + piece.num_tiles;
    LoadRegisterQueries(work.row_tile * kTileRows, piece.request);
    OpenBatch(piece.FirstPage(params_.page_shift));
    LoadTile(piece.first_tile);
    // Behind the first tile: the last piece may still be using it, which holds up no key.
    LoadTailQueries(work.row_tile * kTileRows, piece.request);
    for (int t = piece.first_tile + 1; t < end_; ++t) LoadTile(t);
    CloseBatch();
  }

  // The query chunks that score moves to registers pass through kQuerySlots slots of V columns.
  __device__ __forceinline__ void LoadRegisterQueries(int row, int request) {
#pragma unroll 1
    for (int first = 0; first < kRegisterChunks; first += kQuarterChunks) {
      const int chunks = min(kQuarterChunks, kRegisterChunks - first);
      Barrier* full = &smem_.v_full[v_.Slot()];
      Wait(&smem_.v_empty[v_.Slot()], v_.Parity() ^ 1);
      ArriveExpectBytes(full, chunks * SmemTile<T>::kBytes);
#pragma unroll 1
      for (int c = 0; c < chunks; ++c) {
        TmaLoad4d(&smem_.v[v_.Slot()][c], &q_map_, full, kEvictNormal, (first + c) * kChunkColumns,
                  row, kv_head_, request);
      }
      v_.Advance();
    }
  }

  __device__ __forceinline__ void LoadTailQueries(int row, int request) {
    Wait(&smem_.q_empty, q_parity_ ^ 1);
    q_parity_ ^= 1;
    ArriveExpectBytes(&smem_.q_full, kTailChunks * SmemTile<T>::kBytes);
#pragma unroll
    for (int c = 0; c < kTailChunks; ++c) {
      TmaLoad4d(&smem_.q_tail[c], &q_map_, &smem_.q_full, kEvictNormal,
                (kRegisterChunks + c) * kChunkColumns, row, kv_head_, request);
    }
  }

  __device__ __forceinline__ void LoadTile(int tile) {
    const int page = tile * kTileTokens >> params_.page_shift;
    if (page == batch_end_) {
      CloseBatch();
      OpenBatch(page);
    }
    const int* ids = PageIds(page);
    const int row = tile * kTileTokens & ((1 << params_.page_shift) - 1);
    // Here the arithmetic is the limit and keys must not be late; where the memory is the limit,
    // more in flight is slower.
    if constexpr (kClusterSize > 1) PrefetchTile(tile + 1);
#pragma unroll 1
    for (int quarter = 0; quarter < 4; ++quarter) {
      Barrier* full = &smem_.v_full[v_.Slot()];
      Wait(&smem_.v_empty[v_.Slot()], v_.Parity() ^ 1);
      ArriveExpectBytes(full, kQuarterChunks * SmemTile<T>::kBytes);
#pragma unroll
      for (int c = 0; c < kQuarterChunks; ++c) {
        LoadChunk(&smem_.v[v_.Slot()][c], full, quarter * kQuarterChunks + c, ids, row);
      }
      v_.Advance();
    }
    Wait(&smem_.rope_empty[rope_.Slot()], rope_.Parity() ^ 1);
    ArriveExpectBytes(&smem_.rope_full[rope_.Slot()], SmemTile<T>::kBytes);
    LoadChunk(&smem_.rope[rope_.Slot()], &smem_.rope_full[rope_.Slot()], kChunks - 1, ids, row);
    rope_.Advance();
  }

  // This block's share of a tile, as far as the open batch of page ids reaches. Unrolled: the
  // loader's own time counts here.
  __device__ __forceinline__ void PrefetchTile(int tile) {
    const int page = tile * kTileTokens >> params_.page_shift;
    if (tile >= end_ || page >= batch_end_) return;
    const int page_tokens = min(1 << params_.page_shift, kTileTokens);
    const int row = tile * kTileTokens & ((1 << params_.page_shift) - 1);
    const int* id = PageIds(page);
#pragma unroll 1
    for (int j = 0; j < kTileTokens; j += page_tokens) {
#pragma unroll
      for (int c = 0; c < kChunks; c += kClusterSize) {
        const int chunk = c + (turn_ & 1);
        if (chunk < kChunks) {
          TmaPrefetch4d(&k_map_, chunk * kChunkColumns, kv_head_, row, *id);
        }
      }
      ++id;
    }
  }

  // The ids from that of a page of the open batch on.
  __device__ __forceinline__ const int* PageIds(int page) const {
    return &smem_.pages[pages_.Slot()][page - (batch_end_ - kWarpSize)];
  }

  // A batch of page ids, the first of which is that of page `page` of the sequence.
  __device__ __forceinline__ void OpenBatch(int page) {
    Wait(&smem_.pages_full[pages_.Slot()], pages_.Parity());
    batch_end_ = page + kWarpSize;
  }
  __device__ __forceinline__ void CloseBatch() {
    Arrive(&smem_.pages_empty[pages_.Slot()]);
    pages_.Advance();
  }

  // In one box where pages hold whole tiles, else in one box a page.
  __device__ __forceinline__ void LoadChunk(SmemTile<T>* tile, Barrier* full, int chunk,
                                            const int* ids, int row) {
    if (kClusterSize > 1 && (turn_++ & 1)) return;  // the other block's turn
    const int page_tokens = min(1 << params_.page_shift, kTileTokens);
    T* destination = tile->data;
#pragma unroll 1
    for (int j = 0; j < kTileTokens; j += page_tokens) {
      if constexpr (kClusterSize == 1) {
        TmaLoad4d(destination, &k_map_, full, policy_, chunk * kChunkColumns, kv_head_, row, *ids);
      } else {
        TmaLoadMulticast4d(destination, &k_map_, full, policy_, (1 << kClusterSize) - 1,
                           chunk * kChunkColumns, kv_head_, row, *ids);
      }
      ++ids;
      destination += page_tokens * kChunkColumns;
    }
  }

  SharedMemoryPlan<T>& smem_;
  const CUtensorMap &q_map_, &k_map_;
  const DecodeParams& params_;
  CachePolicy policy_;  // for the keys of this piece
  int kv_head_;
  int end_;  // the tile behind this piece
  uint32_t turn_ = 0, q_parity_ = 0;
  int batch_end_;  // the page of the sequence behind the open batch of page ids
  RingCursor<kPieceSlots> piece_;
  RingCursor<kPageBatches> pages_;
  RingCursor<kValueSlots> v_;
  RingCursor<kRopeSlots> rope_;
};

// ----------------------------------------------------------------------------------------- score

template <typename T, int kClusterSize>
class Scorer {
 public:
  __device__ __forceinline__ Scorer(SharedMemoryPlan<T>& smem, const DecodeParams& params)
      : smem_(smem), params_(params) {}

  __device__ __forceinline__ void Run(const BlockWork& work) {
    const int num_pieces = work.NumPieces();
    const int first_row = work.row_tile * kTileRows;
    for (int i = 0; i < num_pieces; ++i) {
      Wait(&smem_.piece_full[piece_.Slot()], piece_.Parity());
      const Piece& piece = smem_.pieces[piece_.Slot()];
      const int num_tiles = piece.num_tiles, first_tile = piece.first_tile;
      const int visible[2] = {VisibleKeys(first_row + FragmentRow(), piece),
                              VisibleKeys(first_row + FragmentRow() + 8, piece)};
      const int all_visible = VisibleKeys(first_row, piece);
      OnlineSoftmax softmax;
      if (num_tiles > 0) {
        LoadQueries();
        Wait(&smem_.q_full, q_parity_);
        q_parity_ ^= 1;
      }
      for (int t = first_tile; t < first_tile + num_tiles; ++t) {
        float scores[32];
        MultiplyQueriesAndKeys(scores);
        if (t == first_tile + num_tiles - 1) Release<1>(&smem_.q_empty);
        if (t * kTileTokens > all_visible - kTileTokens) {
          MaskFrom(scores, visible[0] - t * kTileTokens, visible[1] - t * kTileTokens);
        }
        float factor[2];
        softmax.Raise(scores, params_.scale_log2, factor);
        WriteFactors(factor);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          softmax.Exponentiate(scores, params_.scale_log2, k);
          StoreFragment(smem_.p[message_.Slot()], scores, k);
        }
        FenceAsyncProxy();
        __syncwarp();
        announce_ = true;
        message_.Advance();
      }
      Announce();
      Finish(work, piece, softmax);
      Arrive(&smem_.piece_empty[piece_.Slot()]);
      piece_.Advance();
    }
  }

 private:
  // Keys that query row `row` sees: the first ones, up to the bottom-right aligned diagonal, which
  // the offset moves.
  __device__ __forceinline__ int VisibleKeys(int row, const Piece& piece) const {
    const int length = piece.length;
    if (!params_.causal) return length;
    const int first = length - params_.s_q + piece.causal_offset;
    return min(length, max(0, first + row / params_.group + 1));
  }

  __device__ __forceinline__ void LoadQueries() {
#pragma unroll
    for (int first = 0; first < kRegisterChunks; first += kQuarterChunks) {
      Wait(&smem_.v_full[v_.Slot()], v_.Parity());
#pragma unroll
      for (int c = 0; c < min(kQuarterChunks, kRegisterChunks - first); ++c) {
#pragma unroll
        for (int k = 0; k < 4; ++k) LoadFragmentA(q_[first + c][k], smem_.v[v_.Slot()][c], k);
      }
      Release<kClusterSize>(&smem_.v_empty[v_.Slot()]);
      v_.Advance();
    }
  }

  // Tells value that the last P is there, if that has not been done. Each lane that wrote factors
  // arrives, for P with the rest of its warp behind a __syncwarp.
  __device__ __forceinline__ void Announce() {
    if (announce_ && IsFirstOfQuad()) Arrive(&smem_.message_full[message_.Slot() ^ 1]);
    announce_ = false;
  }

  // Waits for keys; if they are late, value goes first.
  __device__ __forceinline__ void WaitForKeys(Barrier* full, uint32_t parity) {
    if (!TestWait(full, parity)) {
      Announce();
      Wait(full, parity);
    }
    __syncwarp();
  }

  // S = Q K^T of the next tile in the ring. On return the message slot for its P is free as well.
  __device__ __forceinline__ void MultiplyQueriesAndKeys(float (&scores)[32]) {
    WgmmaFence();
    MultiplyQuarter<0>(scores);
    MultiplyQuarter<1>(scores);
    MultiplyQuarter<2>(scores);
    Announce();
    MultiplyQuarter<3>(scores);
    WaitForKeys(&smem_.rope_full[rope_.Slot()], rope_.Parity());
    MultiplyChunk<kChunks - 1>(scores, smem_.rope[rope_.Slot()]);
    WgmmaCommit();
    Announce();
    Wait(&smem_.message_empty[message_.Slot()], message_.Parity() ^ 1);
    WgmmaWait<0>();
    KeepInRegisters(scores);
    Release<kClusterSize>(&smem_.rope_empty[rope_.Slot()]);
    rope_.Advance();
  }

  template <int kQuarter>
  __device__ __forceinline__ void MultiplyQuarter(float (&scores)[32]) {
    WaitForKeys(&smem_.v_full[v_.Slot()], v_.Parity());
    MultiplyChunk<kQuarter * kQuarterChunks>(scores, smem_.v[v_.Slot()][0]);
    MultiplyChunk<kQuarter * kQuarterChunks + 1>(scores, smem_.v[v_.Slot()][1]);
    v_.Advance();
  }

  // The first chunk overwrites the scores.
  template <int kChunk>
  __device__ __forceinline__ void MultiplyChunk(float (&scores)[32], const SmemTile<T>& keys) {
    constexpr uint64_t kStep = SmemTile<T>::kStepAlongColumns;
    const uint64_t b = keys.DescriptorAlongColumns();
#pragma unroll
    for (int k = 0; k < kChunkColumns / 16; ++k) {
      if constexpr (kChunk < kRegisterChunks) {
        WgmmaM64N64RegA<T>(scores, q_[kChunk][k], b + k * kStep, kChunk > 0 || k > 0);
      } else {
        const uint64_t a = smem_.q_tail[kChunk - kRegisterChunks].DescriptorAlongColumns();
        WgmmaM64N64<T>(scores, a + k * kStep, b + k * kStep, 1);
      }
    }
  }

  // The first lane of each quad writes the factors of its two rows.
  __device__ __forceinline__ void WriteFactors(const float (&factor)[2]) {
    if (!IsFirstOfQuad()) return;
    smem_.row_factor[message_.Slot()][FragmentRow()] = factor[0];
    smem_.row_factor[message_.Slot()][FragmentRow() + 8] = factor[1];
  }

  // The last message of a piece: what O must be multiplied with. Writes the log-sum-exp.
  __device__ __forceinline__ void Finish(const BlockWork& work, const Piece& piece,
                                         const OnlineSoftmax& softmax) {
    float factor[2], lse2[2];
    softmax.Finish(factor, lse2);
    if (piece.invalid) {
      factor[0] = factor[1] = lse2[0] = lse2[1] = NAN;
    }
    Wait(&smem_.message_empty[message_.Slot()], message_.Parity() ^ 1);
    WriteFactors(factor);
    __syncwarp();
    announce_ = true;
    message_.Advance();
    Announce();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = work.row_tile * kTileRows + FragmentRow() + 8 * i;
      if (!IsFirstOfQuad() || row >= params_.rows) continue;
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
  uint32_t q_parity_ = 0;
  RingCursor<kPieceSlots> piece_;
  RingCursor<kValueSlots> v_;
  RingCursor<kRopeSlots> rope_;
  RingCursor<kMessageSlots> message_;
};

// ----------------------------------------------------------------------------------------- value

template <typename T, int kClusterSize>
class ValueAccumulator {
 public:
  __device__ __forceinline__ ValueAccumulator(SharedMemoryPlan<T>& smem, const DecodeParams& params,
                                              int index)
      : smem_(smem), params_(params), index_(index) {
    v_.Advance(index);
  }

  __device__ __forceinline__ void Run(const BlockWork& work) {
    const int num_pieces = work.NumPieces();
    for (int i = 0; i < num_pieces; ++i) {
      Wait(&smem_.message_full[message_.Slot()], message_.Parity());
      const int num_tiles = ThisPiece().num_tiles;
      if (num_tiles > 0) v_.Advance(kQuerySlots);
      Clear();
      for (int t = 0; t < num_tiles; ++t) {
        RingCursor<kValueSlots> quarters[kBlocks] = {v_, v_};
        quarters[1].Advance(2);
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
          Wait(&smem_.v_full[quarters[n].Slot()], quarters[n].Parity());
        }
        if (t > 0) Wait(&smem_.message_full[message_.Slot()], message_.Parity());
        Rescale();
        if (t == num_tiles - 1) {
          const int valid = ThisPiece().length - (ThisPiece().first_tile + t) * kTileTokens;
          if (valid < kTileTokens) ClearRowsFrom(valid, quarters);
        }
        MultiplyAndAdd(quarters);
        v_.Advance(4);
      }
      if (num_tiles > 0) Wait(&smem_.message_full[message_.Slot()], message_.Parity());
      float factor[2];
      ReadFactors(factor);
      QuadBroadcast(factor);
      Write(work, factor);
      ReleaseMessage();
      Arrive(&smem_.piece_empty[piece_.Slot()]);
      piece_.Advance();
    }
  }

 private:
  static constexpr int kBlocks = 4 / kValueWarpgroups;  // quarters of a warpgroup
  static constexpr int kAccumulators = kTileRows * kQuarterColumns / kWarpgroupSize;

  __device__ __forceinline__ const Piece& ThisPiece() const { return smem_.pieces[piece_.Slot()]; }

  // Each lane that read factors arrives, for P with the rest of its warp behind a __syncwarp.
  __device__ __forceinline__ void ReleaseMessage() {
    __syncwarp();
    if (IsFirstOfQuad()) Arrive(&smem_.message_empty[message_.Slot()]);
    message_.Advance();
  }

  // The factors of this thread's two rows, 1 in all but the first lane of a quad.
  __device__ __forceinline__ void ReadFactors(float (&factor)[2]) const {
    factor[0] = factor[1] = 1.f;
    if (!IsFirstOfQuad()) return;
    factor[0] = smem_.row_factor[message_.Slot()][FragmentRow()];
    factor[1] = smem_.row_factor[message_.Slot()][FragmentRow() + 8];
  }

  __device__ __forceinline__ void Clear() {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int j = 0; j < kAccumulators; ++j) o_[n][j] = 0.f;
    }
  }

  __device__ __forceinline__ void Rescale() {
    float factor[2];
    ReadFactors(factor);
    if (!__any_sync(kFullWarp, factor[0] != 1.f || factor[1] != 1.f)) return;
    QuadBroadcast(factor);
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int j = 0; j < kAccumulators; j += 4) {
        o_[n][j] *= factor[0];
        o_[n][j + 1] *= factor[0];
        o_[n][j + 2] *= factor[1];
        o_[n][j + 3] *= factor[1];
      }
    }
  }

  // Slots of the last page past the sequence's end may hold NaN, and 0 * NaN is NaN.
  __device__ __forceinline__ void ClearRowsFrom(
      int row, const RingCursor<kValueSlots> (&quarters)[kBlocks]) {
    const int units = (kTileTokens - row) * SmemTile<T>::kUnitsPerRow;
#pragma unroll 1
    for (int c = 0; c < kBlocks * kQuarterChunks; ++c) {
      const int slot = c < kQuarterChunks ? quarters[0].Slot() : quarters[1].Slot();
      uint4* rows = reinterpret_cast<uint4*>(smem_.v[slot][c % kQuarterChunks].data) +
                    row * SmemTile<T>::kUnitsPerRow;
#pragma unroll 1
      for (int i = Opaque(threadIdx.x % kWarpgroupSize); i < units; i += kWarpgroupSize) {
        rows[i] = make_uint4(0, 0, 0, 0);
      }
    }
    FenceAsyncProxy();
    NamedBarrierSync(1 + index_, kWarpgroupSize);
  }

  // O += P V. The first quarter is handed back while the second one is multiplied.
  __device__ __forceinline__ void MultiplyAndAdd(
      const RingCursor<kValueSlots> (&quarters)[kBlocks]) {
    const uint64_t a = smem_.p[message_.Slot()].DescriptorAlongColumns();
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) KeepInRegisters(o_[n]);
    WgmmaFence();
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      const uint64_t b = smem_.v[quarters[n].Slot()][0].DescriptorAlongRows();
#pragma unroll
      for (int k = 0; k < kTileTokens / 16; ++k) {
        WgmmaM64N128TransposedB<T>(o_[n], a + k * SmemTile<T>::kStepAlongColumns,
                                   b + k * SmemTile<T>::kStepAlongRows, 1);
      }
      WgmmaCommit();
    }
    WgmmaWait<1>();
    Release<kClusterSize>(&smem_.v_empty[quarters[0].Slot()]);
    WgmmaWait<0>();
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) KeepInRegisters(o_[n]);
    Release<kClusterSize>(&smem_.v_empty[quarters[1].Slot()]);
    ReleaseMessage();
  }

  __device__ __forceinline__ void Write(const BlockWork& work, const float (&factor)[2]) {
    const Piece& piece = ThisPiece();
    const bool split = piece.slot >= 0;
    const int64_t head =
        static_cast<int64_t>(split ? piece.slot : piece.request) * params_.num_kv_heads +
        work.kv_head;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = Opaque(work.row_tile * kTileRows + FragmentRow() + 8 * i);
      const int64_t offset = (head * params_.rows + row) * kHeadDimV + index_ * kQuarterColumns;
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
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int j = 0; j < kQuarterColumns; j += 32) {
        uint32_t words[4];
#pragma unroll
        for (int g = 0; g < 4; ++g) {
          const float* e = o_[n] + (j + 8 * g) / 2 + 2 * i;
          words[g] = Pack<T>(Normalised(e[0], factor), Normalised(e[1], factor));
        }
        QuadTranspose(words);
        if (store) {
          *reinterpret_cast<uint4*>(row + n * 2 * kQuarterColumns + j + threadIdx.x % 4 * 8) =
              make_uint4(words[0], words[1], words[2], words[3]);
        }
      }
    }
  }

  // Of two groups of 8 columns an even lane takes the first one and an odd lane the second: 4
  // neighbouring columns each, 16 bytes, after an exchange with the lane beside.
  __device__ __forceinline__ void WritePartialRow(float* row, int i, float factor, bool store) {
    if (!__any_sync(kFullWarp, store)) return;
    const bool odd = threadIdx.x & 1;
    row += odd ? 8 + FragmentColumn() - 2 : FragmentColumn();
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int j = 0; j < kQuarterColumns; j += 16) {
        const float* first = o_[n] + j / 2 + 2 * i;
        const float* second = first + 4;
        float kept[2], other[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          kept[c] = Normalised(odd ? second[c] : first[c], factor);
          other[c] = __shfl_xor_sync(kFullWarp, Normalised(odd ? first[c] : second[c], factor), 1);
        }
        if (!store) continue;
        *reinterpret_cast<float4*>(row + n * 2 * kQuarterColumns + j) =
            odd ? make_float4(other[0], other[1], kept[0], kept[1])
                : make_float4(kept[0], kept[1], other[0], other[1]);
      }
    }
  }

  // A row that sees no key is 0, also where a value that it does not see is not finite.
  __device__ __forceinline__ static float Normalised(float x, float factor) {
    return factor == 0.f ? 0.f : x * factor;
  }

  SharedMemoryPlan<T>& smem_;
  const DecodeParams& params_;
  const int index_;
  float o_[kBlocks][kAccumulators];
  RingCursor<kPieceSlots> piece_;
  RingCursor<kValueSlots> v_;
  RingCursor<kMessageSlots> message_;
};

// ---------------------------------------------------------------------------------------- kernel

template <typename T, int kClusterSize>
__device__ __forceinline__ void InitBarriers(SharedMemoryPlan<T>& smem) {
  for (int i = 0; i < kValueSlots; ++i) {
    BarrierInit(&smem.v_full[i], 1);
    BarrierInit(&smem.v_empty[i], kWarpsPerWarpgroup * kClusterSize);
  }
  for (int i = 0; i < kRopeSlots; ++i) {
    BarrierInit(&smem.rope_full[i], 1);
    BarrierInit(&smem.rope_empty[i], kWarpsPerWarpgroup * kClusterSize);
  }
  for (int i = 0; i < kMessageSlots; ++i) {
    BarrierInit(&smem.message_full[i], kWarpgroupSize / 4);
    BarrierInit(&smem.message_empty[i], kWarpgroupSize / 4 * kValueWarpgroups);
  }
  for (int i = 0; i < kPieceSlots; ++i) {
    BarrierInit(&smem.piece_full[i], 1);
    BarrierInit(&smem.piece_empty[i], 1 + kWarpgroupSize * (1 + kValueWarpgroups));
  }
  for (int i = 0; i < kPageBatches; ++i) {
    BarrierInit(&smem.pages_full[i], kWarpSize);
    BarrierInit(&smem.pages_empty[i], 1);
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
  if (threadIdx.x == kWarpSize) {
    PrefetchTensorMap(&q_map);
    PrefetchTensorMap(&k_map);
  }
  WaitForPriorKernels();
  const BlockWork work(params);
  if constexpr (kClusterSize > 1) {
    __syncwarp();
    ClusterSync();
  } else {
    __syncthreads();
  }
  AllowNextKernel();

  const int warpgroup = WarpUniform(threadIdx.x / kWarpgroupSize);
  if (warpgroup == kLoadWarpgroup) {
    ShrinkRegisters<kLoadRegisters>();
    const int warp = WarpUniform(threadIdx.x / kWarpSize) % kWarpsPerWarpgroup;
    if (warp == kPlanWarp) {
      Planner<T>(smem, params).Run(work);
    } else if (warp == kLoadWarp && IsFirstLane()) {
      Loader<T, kClusterSize>(smem, q_map, k_map, params).Run(work);
    }
    __syncwarp();
  } else if (warpgroup == kScoreWarpgroup) {
    GrowRegisters<kScoreRegisters>();
    Scorer<T, kClusterSize>(smem, params).Run(work);
  } else {
    GrowRegisters<kValueRegisters>();
    ValueAccumulator<T, kClusterSize>(smem, params, warpgroup).Run(work);
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
                           std::optional<I32<1>> causal_offset, ffi::Result<ffi::AnyBuffer> out,
                           F32Result<3> lse, F32Result<4> o_partial, F32Result<3> lse_partial,
                           float softmax_scale, bool causal) {
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
  if (causal_offset) {
    JAX_FLASHMLA_CHECK(CheckShape(kOp, "causal_offset", causal_offset->dimensions(), {batch}));
  }
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
      .causal_offset = causal_offset ? causal_offset->typed_data() : nullptr,
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
                                  .OptionalArg<I32<1>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<F32<3>>()
                                  .Ret<F32<4>>()
                                  .Ret<F32<3>>()
                                  .Attr<float>("softmax_scale")
                                  .Attr<bool>("causal"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_flashmla
