// The plan warp of dense decode: pieces and page ids, ahead of all others.
#pragma once

#include "dense_decode/bounds.cuh"

namespace jax_flashmla::dense_decode {

// One warp, ahead of all others: reads the lengths and the block table, so that
// nobody else waits for global memory to know what to do.
template <typename T, bool kMakesSchedule>
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
    Piece piece;
    piece.request = request;
    const int64_t capacity = int64_t{params_.max_blocks} << params_.page_shift;
    const int length = params_.cache_seqlens[piece.request];
    piece.invalid = length > capacity;
    piece.length = piece.invalid ? static_cast<int>(capacity) : max(length, 0);
    piece.causal_offset = 0;
    if (params_.causal_offset != nullptr) {
      piece.causal_offset =
          min(max(params_.causal_offset[piece.request], -piece.length), params_.s_q);
    }
    const int tiles = piece.length / kTileTokens + (piece.length % kTileTokens != 0);
    const bool goes_on = request == work.end.request;  // in the next part
    // The last split runs to the actual length, whatever the schedule was made for.
    const int last = goes_on ? min(work.end.tile, tiles) : tiles;
    piece.first_tile = min(first, tiles);
    piece.num_tiles = max(last - piece.first_tile, 0);
    const bool shared = first > 0 || goes_on;
    // Where the part that makes the second split begins, if there are two.
    const int second = first > 0 ? kOwnBegin : kOwnBegin + 1;
    piece.joined = shared && BeginsInSecondOfTwo<kMakesSchedule>(smem_, params_, work.part, second);
    const bool writes_result = !shared || (piece.joined && first == 0);
    piece.slot = writes_result ? -1 : PartialSlot(work.part, first == 0);
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

}  // namespace jax_flashmla::dense_decode
