// The loading thread of dense decode.
#pragma once

#include "dense_decode/block.cuh"
#include "sm90/tma.cuh"

namespace jax_flashmla::dense_decode {

// One thread, which issues all copies.
template <typename T, int kClusterSize>
class Loader {
 public:
  __device__ __forceinline__ Loader(SharedMemoryPlan<T>& smem, const CUtensorMap& q_map,
                                    const CUtensorMap& k_map, const CUtensorMap& k_short_map,
                                    const CUtensorMap& o_map, const DecodeParams& params)
      : smem_(smem),
        q_map_(q_map),
        k_map_(k_map),
        k_short_map_(k_short_map),
        o_map_(o_map),
        params_(params) {
    if constexpr (kClusterSize > 1) turn_ = ClusterRank();
  }

  // Those of the first piece, for which its request is enough: score expects them even if that
  // turns out to be empty. They go to this block alone, which no other one must be ready for.
  __device__ __forceinline__ void LoadFirstQueries(const BlockWork& work) {
    kv_head_ = work.kv_head;
    if constexpr (kPacesItself) {
      fair_progress_ = ReadRelaxed(params_.progress);
      progress_ = ReadRelaxed(params_.progress);
    }
    if (work.NumPieces() <= 0) return;
    LoadRegisterQueries(Opaque(work.row_tile) * kTileRows, work.begin.request);
  }

  __device__ __forceinline__ void Run(const BlockWork& work) {
    // Pages that only this cluster reads, once, make room in the L2 for partial results, if this
    // part writes any. Where nothing is split it is slower.
    const bool read_once = params_.row_tiles <= kClusterSize;
    const bool shares_request = work.begin.tile > 0 || work.end.tile > 0;
    evict_first_ = read_once && shares_request;
    for (int left = work.NumPieces(); left > 0; --left) {
      Wait(&smem_.piece_full[piece_.Slot()], piece_.Parity());
      const Piece& piece = smem_.pieces[piece_.Slot()];
      piece_.Advance();  // already here: its barrier's address has no register
      const bool is_first = piece.request == work.begin.request;
      if (kPacesItself && !is_first) AddProgress(kRequestOverhead);
      LoadPiece(work, piece, is_first);
      if (piece.AddsOther()) LoadOtherSplit(work);
      Arrive(&smem_.piece_empty[piece_.Before(1).Slot()]);
    }
  }

 private:
  __device__ __forceinline__ void LoadPiece(const BlockWork& work, const Piece& piece,
                                            bool has_queries) {
    if (piece.num_tiles == 0) return;
    end_ = piece.first_tile + piece.num_tiles;
    if (!has_queries) LoadRegisterQueries(Opaque(work.row_tile) * kTileRows, piece.request);
    OpenBatch(piece.FirstPage(params_.page_shift));
#pragma unroll 1
    for (int t = piece.first_tile; t < end_; ++t) {
      const int tokens = piece.length - t * kTileTokens;
      if (IsShort(tokens)) {
        LoadTile</*kIsShort=*/true>(t, tokens);
      } else {
        LoadTile</*kIsShort=*/false>(t, tokens);
      }
      // Behind the first tile: the last piece may still be using them, which holds up no key.
      if (t == piece.first_tile) LoadTailQueries(Opaque(work.row_tile) * kTileRows, piece.request);
    }
    CloseBatch();
  }

  // The rows of the other split of the last request, a quarter a slot like those of a tile.
  __device__ __forceinline__ void LoadOtherSplit(const BlockWork& work) {
    Wait(&smem_.other_written, 0);
    FenceAsyncProxyGlobal();
#pragma unroll 1
    for (int quarter = 0; quarter < kQuarters; ++quarter) {
      Barrier* full = &smem_.v_full[v_.Slot()];
      Wait(&smem_.v_empty[v_.Slot()], v_.Parity() ^ 1);
      ArriveExpectBytes(full, kQuarterChunks * SmemTile<T>::kBytes);
#pragma unroll 1
      for (int c = 0; c < kQuarterChunks; ++c) {
        TmaLoad4d(&smem_.v[v_.Slot()][c], &o_map_, full, kEvictNormal,
                  (quarter * kQuarterChunks + c) * kChunkColumns, Opaque(work.row_tile) * kTileRows,
                  kv_head_, PartialSlot(Opaque(work.part) + 1, false));
      }
      v_.Advance();
    }
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

  // `tokens` are left of the sequence from this tile on. Of a short tile no more are loaded,
  // rounded up to kShortBoxTokens: what the slots hold instead is masked in S and cleared in V.
  template <bool kIsShort>
  __device__ __forceinline__ void LoadTile(int tile, int tokens) {
    const int page = PageOf(tile);
    if (page == batch_end_) {
      CloseBatch();
      OpenBatch(page);
    }
    const int* ids = PageIds(page);
    first_id_ = *ids;
    const int row = RowInPage(tile);
    // Here the arithmetic is the limit and keys must not be late; where the memory is the limit,
    // more in flight is slower.
    if constexpr (kClusterSize > 1 && !kIsShort) PrefetchTile(tile + 1, tokens - kTileTokens);
    const auto bytes = [&] {  // of a chunk; there is no register to keep it in
      const int boxes =
          kIsShort ? CeilDiv(Opaque(tokens), kShortBoxTokens) : kTileTokens / kShortBoxTokens;
      return boxes * kShortBoxTokens * SmemTile<T>::kRowBytes;
    };
    const auto load = [&](SmemTile<T>* to, Barrier* full, int chunk) {
      if constexpr (kIsShort) {
        LoadShortChunk(to, full, chunk, row, tokens);
      } else {
        LoadChunk(to, full, chunk, ids, row);
      }
    };
#pragma unroll 1
    for (int quarter = 0; quarter < 4; ++quarter) {
      Barrier* full = &smem_.v_full[v_.Slot()];
      Wait(&smem_.v_empty[v_.Slot()], v_.Parity() ^ 1);
      if constexpr (kPacesItself) Pace();
      ArriveExpectBytes(full, kQuarterChunks * bytes());
#pragma unroll(kIsShort ? 1 : kQuarterChunks)
      for (int c = 0; c < kQuarterChunks; ++c) {
        load(&smem_.v[v_.Slot()][c], full, quarter * kQuarterChunks + c);
      }
      v_.Advance();
    }
    Wait(&smem_.rope_empty[rope_.Slot()], rope_.Parity() ^ 1);
    ArriveExpectBytes(&smem_.rope_full[rope_.Slot()], bytes());
    load(&smem_.rope[rope_.Slot()], &smem_.rope_full[rope_.Slot()], kChunks - 1);
    rope_.Advance();
    if constexpr (kPacesItself) FollowProgress();
  }

  // Where the memory is the limit, waits until fewer than `most_in_flight_` slots of keys are on
  // their way. More would not be faster, but make each block wait longer for its next tile.
  __device__ __forceinline__ void Pace() {
    for (; in_flight_ >= most_in_flight_; --in_flight_) {
      const RingCursor<kValueSlots> oldest = v_.Before(in_flight_);
      Wait(&smem_.v_full[oldest.Slot()], oldest.Parity());
    }
    ++in_flight_;
  }

  // So that all blocks end together, those that are ahead of the others leave the memory to those
  // that are behind. Counted is what the tile schedule counts, by which parts are equal. What the
  // others have done was read one tile ago, so that nobody waits for it.
  __device__ __forceinline__ void FollowProgress() {
    const int lead = static_cast<int>(fair_progress_ - progress_), blocks = params_.loading_blocks;
    if (blocks == 0) return;
    most_in_flight_ = lead > blocks ? kFewInFlight : lead < -blocks ? kManyInFlight : kInFlight;
    AddProgress(1);
    progress_ = ReadRelaxed(params_.progress);
  }
  __device__ __forceinline__ void AddProgress(int cost) {
    fair_progress_ += cost * params_.loading_blocks;
    CountRelaxed(params_.progress, cost);
  }

  // This block's share of a tile, as far as the open batch of page ids reaches. Unrolled: the
  // loader's own time counts here.
  __device__ __forceinline__ void PrefetchTile(int tile, int tokens) {
    const int page = PageOf(tile);
    if (tile >= end_ || page >= batch_end_ || IsShort(tokens)) return;
    const int box_tokens = BoxTokens();
    const int row = RowInPage(tile);
    const int* id = PageIds(page);
#pragma unroll 1
    for (int j = 0; j < kTileTokens; j += box_tokens) {
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

  // Whether the last tile of a sequence, which has so many tokens, is loaded in part. Pages that
  // are smaller than a tile do that by themselves.
  __device__ __forceinline__ bool IsShort(int tokens) const {
    return tokens <= kTileTokens - kShortBoxTokens && BoxTokens() == kTileTokens;
  }

  // Where a tile begins: the page of the sequence, and the token in it.
  __device__ __forceinline__ int PageOf(int tile) const {
    return tile * kTileTokens >> params_.page_shift;
  }
  __device__ __forceinline__ int RowInPage(int tile) const {
    return tile * kTileTokens & ((1 << params_.page_shift) - 1);
  }
  // Tokens of a box: all of a tile, or of a page that is smaller.
  __device__ __forceinline__ int BoxTokens() const {
    return min(1 << params_.page_shift, kTileTokens);
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
    LoadBox(tile->data, k_map_, full, chunk, first_id_, row);
    const int box_tokens = BoxTokens();
#pragma unroll 1
    for (int j = box_tokens; j < kTileTokens; j += box_tokens) {
      LoadBox(tile->data + j * kChunkColumns, k_map_, full, chunk, *++ids, row);
    }
  }

  // The first `tokens` rows of a chunk, in boxes of kShortBoxTokens.
  __device__ __forceinline__ void LoadShortChunk(SmemTile<T>* tile, Barrier* full, int chunk,
                                                 int row, int tokens) {
    if (kClusterSize > 1 && (turn_++ & 1)) return;  // the other block's turn
#pragma unroll 1
    for (int j = 0; j < tokens; j += kShortBoxTokens) {
      LoadBox(tile->data + j * kChunkColumns, k_short_map_, full, chunk, first_id_, row + j);
    }
  }

  __device__ __forceinline__ void LoadBox(T* destination, const CUtensorMap& map, Barrier* full,
                                          int chunk, int page_id, int row) {
    // Without a cluster there is no register to keep the policy in.
    const bool evict_first = kClusterSize > 1 ? evict_first_ : Opaque(evict_first_);
    const CachePolicy policy = evict_first ? kEvictFirst : kEvictNormal;
    if constexpr (kClusterSize == 1) {
      TmaLoad4d(destination, &map, full, policy, chunk * kChunkColumns, kv_head_, row, page_id);
    } else {
      TmaLoadMulticast4d(destination, &map, full, policy, (1 << kClusterSize) - 1,
                         chunk * kChunkColumns, kv_head_, row, page_id);
    }
  }

  SharedMemoryPlan<T>& smem_;
  const CUtensorMap &q_map_, &k_map_, &k_short_map_, &o_map_;
  const DecodeParams& params_;
  bool evict_first_;  // keys from the L2
  int kv_head_;
  int end_;       // the tile behind this piece
  int first_id_;  // of this tile's pages
  static constexpr bool kPacesItself = kClusterSize == 1;
  static constexpr int kFewInFlight = 3, kInFlight = 4, kManyInFlight = 6;
  int in_flight_ = 0, most_in_flight_ = kInFlight;  // slots of keys
  uint32_t fair_progress_, progress_;  // what it were if all had done as much as this block, and is
  uint32_t turn_ = 0, q_parity_ = 0;
  int batch_end_;  // the page of the sequence behind the open batch of page ids
  RingCursor<kPieceSlots> piece_;
  RingCursor<kPageBatches> pages_;
  RingCursor<kValueSlots> v_;
  RingCursor<kRopeSlots> rope_;
};

}  // namespace jax_flashmla::dense_decode
