// Paging: which page holds which tokens of a sequence. A cache with another layout of pages gets a
// source of its own beside this one.
#pragma once

#include "split_kv/work.cuh"

namespace jax_flashmla::split_kv {

// Which pages a sequence has.
struct PageTable {
  const int32_t* block_table;  // [b, max_pages]
  int32_t num_pages;           // pages of the pool
  int32_t max_pages;
  int32_t page_shift;  // page_block_size = 1 << page_shift

  // Where a tile begins: which page of the sequence, and which token in that page.
  __device__ __forceinline__ int PageOf(int tile) const { return tile * kTileTokens >> page_shift; }
  __device__ __forceinline__ int TokenInPage(int tile) const {
    return tile * kTileTokens & ((1 << page_shift) - 1);
  }
  // How many tokens one load brings: a whole tile, or a page if that is smaller.
  __device__ __forceinline__ int BoxTokens() const { return min(1 << page_shift, kTileTokens); }

  // The pages of a piece: from FirstPage up to and not including EndPage.
  __device__ __forceinline__ int FirstPage(const Piece& piece) const {
    return static_cast<int>(int64_t{piece.first_tile} * kTileTokens >> page_shift);
  }
  __device__ __forceinline__ int EndPage(const Piece& piece) const {
    if (piece.num_tiles == 0) return FirstPage(piece);
    const int64_t tiles_end = int64_t{piece.first_tile + piece.num_tiles} * kTileTokens;
    return static_cast<int>((min(tiles_end, int64_t{piece.length}) - 1 >> page_shift) + 1);
  }
};

// Hands page ids to the loader through a ring with 32 ids a stage, one from each lane. One warp.
template <int kStages>
class PageSource {
 public:
  // `causal_offset` may be null.
  __device__ __forceinline__ PageSource(const PageTable& table, const int32_t* cache_seqlens,
                                        const int32_t* causal_offset, int32_t s_q,
                                        int32_t (&pages)[kStages][kWarpSize],
                                        RingBarriers<kStages>& barriers)
      : table_(table),
        cache_seqlens_(cache_seqlens),
        causal_offset_(causal_offset),
        s_q_(s_q),
        pages_(pages),
        barriers_(barriers) {}

  // Starts to read what Plan() needs first.
  __device__ __forceinline__ int32_t Prefetch(int sequence, int first_tile) const {
    return PageIdOfLane(sequence, int64_t{first_tile} * kTileTokens >> table_.page_shift);
  }

  // Fills in length, causal_offset and invalid: a length beyond the block table is invalid.
  __device__ __forceinline__ void ReadSequence(Piece& piece) const {
    const int64_t capacity = int64_t{table_.max_pages} << table_.page_shift;
    const int length = cache_seqlens_[piece.sequence];
    piece.invalid = length > capacity;
    piece.length = piece.invalid ? static_cast<int>(capacity) : max(length, 0);
    piece.causal_offset = 0;
    if (causal_offset_ != nullptr) {
      piece.causal_offset = min(max(causal_offset_[piece.sequence], -piece.length), s_q_);
    }
  }

  // Hands over the page ids of a piece; `id` is what Prefetch() returned for it. An id outside the
  // pool becomes -1, which loads zeros, and makes the piece invalid.
  __device__ __forceinline__ void Plan(Piece& piece, int32_t id) {
    const int lane = threadIdx.x % kWarpSize;
    const int first = table_.FirstPage(piece), end = table_.EndPage(piece);
    for (int page = first; page < end; page += kWarpSize) {
      if (page > first) id = PageIdOfLane(piece.sequence, page);
      const bool outside = page + lane < end && (id < 0 || id >= table_.num_pages);
      if (outside || page + lane >= end) id = -1;
      const bool any_outside = __any_sync(kFullWarp, outside);
      Wait(&barriers_.empty[cursor_.Stage()], cursor_.Parity() ^ 1);
      pages_[cursor_.Stage()][lane] = id;
      // The piece was handed over before. Score reads `invalid` only when it finishes the piece,
      // after tiles whose loads have waited for these page ids.
      if (any_outside && lane == 0) piece.invalid = 1;
      Arrive(&barriers_.full[cursor_.Stage()]);
      cursor_.Advance();
    }
  }

 private:
  // The block-table entry of page first + lane, -1 beyond the table.
  __device__ __forceinline__ int32_t PageIdOfLane(int sequence, int64_t first) const {
    const int64_t page = first + threadIdx.x % kWarpSize;
    if (page >= table_.max_pages) return -1;
    return table_.block_table[int64_t{sequence} * table_.max_pages + page];
  }

  const PageTable& table_;
  const int32_t* cache_seqlens_;
  const int32_t* causal_offset_;
  int32_t s_q_;
  int32_t (&pages_)[kStages][kWarpSize];
  RingBarriers<kStages>& barriers_;
  RingCursor<kStages> cursor_;
};

}  // namespace jax_flashmla::split_kv
