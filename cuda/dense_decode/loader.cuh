// The loading thread of dense decode: it issues all copies into shared memory.
#pragma once

#include "decode/block.cuh"
#include "sm90/tma.cuh"
#include "split_kv/page_source.cuh"

namespace jax_flashmla::dense_decode {

using namespace decode;  // NOLINT: used in nearly every line

constexpr int kShortBoxTokens = 16;  // a short last tile is loaded in boxes of this many

// The parameters of dense decode.
struct DenseParams {
  DecodeParams decode;
  PageTable table;
  const int32_t* cache_seqlens;  // [b]
  const int32_t* causal_offset;  // [b], or null
  // The cost units that all blocks have done so far, plus whatever it held before. It sets the pace
  // of the loaders and nothing else. It shares memory with the flags.
  uint32_t* progress;
  int32_t loading_blocks;  // 0: not all blocks run at once, so none adapts its pace
};

// The tensor maps of what is loaded: queries, keys in boxes of a tile or a page, keys in short
// boxes, and the partial results of other splits.
struct LoadMaps {
  const CUtensorMap &q, &k, &k_short, &o_partial;
};

template <typename Config>
class Loader {
  using T = Config::Element;
  static constexpr int kClusterSize = Config::kClusterSize;
  static constexpr int kChunks = Config::kChunks, kTailChunks = Config::kTailChunks;

 public:
  __device__ __forceinline__ Loader(SharedMemoryPlan<Config>& smem, const LoadMaps& maps,
                                    const DenseParams& params, const BlockWork& work)
      : smem_(smem), maps_(maps), params_(params), kv_head_(work.kv_head) {
    if constexpr (kClusterSize > 1) turn_ = ClusterRank();
  }

  // Loads the queries of the first piece. Only its sequence is known yet: they are loaded even if
  // the piece turns out to have no tiles (Piece::HasQueries). They go to this block alone, so the
  // other block of a cluster need not be ready.
  __device__ __forceinline__ void LoadFirstQueries(const BlockWork& work) {
    if constexpr (kIsPaced) {
      fair_progress_ = progress_ = ReadRelaxed(params_.progress);
    }
    if (work.NumPieces() <= 0) return;
    LoadRegisterQueries(Opaque(work.row_tile) * kTileRows, work.begin.sequence);
  }

  __device__ __forceinline__ void Run(const BlockWork& work) {
    // If no other cluster reads these pages, let them leave the L2 first: that leaves
    // room for partial results. It is slower if nothing is split, so only a part that
    // shares a sequence does.
    const bool read_once = params_.decode.query.row_tiles <= kClusterSize;
    const bool shares_sequence = work.begin.tile > 0 || work.end.tile > 0;
    evict_first_ = read_once && shares_sequence;
    for (int left = work.NumPieces(); left > 0; --left) {
      Wait(&smem_.pieces_ready.full[piece_.Stage()], piece_.Parity());
      const Piece& piece = smem_.pieces[piece_.Stage()];
      piece_.Advance();  // early: holding the address of its barrier across LoadPiece would spill
      const bool is_first = piece.sequence == work.begin.sequence;
      if (kIsPaced && !is_first) AddProgress(kSequenceOverhead);
      LoadPiece(work, piece, is_first);
      if (piece.AddsOther()) LoadOtherSplit(work);
      Arrive(&smem_.pieces_ready.empty[piece_.Before(1).Stage()]);
    }
  }

 private:
  __device__ __forceinline__ void LoadPiece(const BlockWork& work, const Piece& piece,
                                            bool is_first) {
    // LoadFirstQueries() has loaded those of the first piece.
    if (!is_first && piece.HasQueries(is_first)) {
      LoadRegisterQueries(Opaque(work.row_tile) * kTileRows, piece.sequence);
    }
    if (piece.num_tiles == 0) return;
    end_ = piece.first_tile + piece.num_tiles;
    OpenIds(params_.table.FirstPage(piece));
#pragma unroll 1
    for (int t = piece.first_tile; t < end_; ++t) {
      const int tokens = piece.length - t * kTileTokens;
      if (IsShort(tokens)) {
        LoadTile</*kIsShort=*/true>(t, tokens);
      } else {
        LoadTile</*kIsShort=*/false>(t, tokens);
      }
      // After the first tile, because the previous piece may still use q_tail. Score frees it with
      // that piece's last rope, for which LoadTile has just waited, so this wait delays no keys.
      if (t == piece.first_tile) LoadTailQueries(Opaque(work.row_tile) * kTileRows, piece.sequence);
    }
    CloseIds();
  }

  // Loads the rows of the other split of the last sequence: a quarter a stage, like a tile.
  __device__ __forceinline__ void LoadOtherSplit(const BlockWork& work) {
    Wait(&smem_.other.written, 0);
    FenceAsyncProxyGlobal();
#pragma unroll 1
    for (int quarter = 0; quarter < kQuarters; ++quarter) {
      Barrier* full = &smem_.v_ready.full[v_.Stage()];
      Wait(&smem_.v_ready.empty[v_.Stage()], v_.Parity() ^ 1);
      ArriveExpectBytes(full, kQuarterChunks * SmemTile<T>::kBytes);
#pragma unroll 1
      for (int c = 0; c < kQuarterChunks; ++c) {
        TmaLoad4d(&smem_.v[v_.Stage()][c], &maps_.o_partial, full, kEvictNormal,
                  (quarter * kQuarterChunks + c) * kChunkColumns, Opaque(work.row_tile) * kTileRows,
                  kv_head_, PartialIndex(Opaque(work.part) + 1, false));
      }
      v_.Advance();
    }
  }

  // Loads the query chunks that score keeps in registers, through kQueryStages stages of V columns.
  __device__ __forceinline__ void LoadRegisterQueries(int row, int sequence) {
#pragma unroll 1
    for (int first = 0; first < kRegisterChunks; first += kQuarterChunks) {
      const int chunks = min(kQuarterChunks, kRegisterChunks - first);
      Barrier* full = &smem_.v_ready.full[v_.Stage()];
      Wait(&smem_.v_ready.empty[v_.Stage()], v_.Parity() ^ 1);
      ArriveExpectBytes(full, chunks * SmemTile<T>::kBytes);
#pragma unroll 1
      for (int c = 0; c < chunks; ++c) {
        TmaLoad4d(&smem_.v[v_.Stage()][c], &maps_.q, full, kEvictNormal,
                  (first + c) * kChunkColumns, row, kv_head_, sequence);
      }
      v_.Advance();
    }
  }

  __device__ __forceinline__ void LoadTailQueries(int row, int sequence) {
    Barrier* full = &smem_.q_tail_ready.full[q_tail_.Stage()];
    Wait(&smem_.q_tail_ready.empty[q_tail_.Stage()], q_tail_.Parity() ^ 1);
    ArriveExpectBytes(full, kTailChunks * SmemTile<T>::kBytes);
#pragma unroll
    for (int c = 0; c < kTailChunks; ++c) {
      TmaLoad4d(&smem_.q_tail[q_tail_.Stage()][c], &maps_.q, full, kEvictNormal,
                (kRegisterChunks + c) * kChunkColumns, row, kv_head_, sequence);
    }
    q_tail_.Advance();
  }

  // Loads a tile; `tokens`: how many the sequence has from this tile on. Of a short tile only these
  // are loaded, rounded up to kShortBoxTokens. The rest of the stage holds old data, which is
  // masked in S and cleared in V.
  template <bool kIsShort>
  __device__ __forceinline__ void LoadTile(int tile, int tokens) {
    const int page = params_.table.PageOf(tile);
    // No tile straddles two sets of ids: a set begins with a tile, and its 32
    // pages are whole tiles.
    if (page == ids_end_) {
      CloseIds();
      OpenIds(page);
    }
    const int* ids = PageIds(page);
    first_id_ = *ids;
    const int row = params_.table.TokenInPage(tile);
    // With a cluster the arithmetic is the limit, and keys must not be late. Elsewhere memory is
    // the limit, and more loads in flight would be slower.
    if constexpr (kClusterSize > 1 && !kIsShort) PrefetchTile(tile + 1, tokens - kTileTokens);
    const auto bytes = [&] {  // of a chunk; computed again each time, because no register is free
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
    for (int quarter = 0; quarter < kQuarters; ++quarter) {
      Barrier* full = &smem_.v_ready.full[v_.Stage()];
      Wait(&smem_.v_ready.empty[v_.Stage()], v_.Parity() ^ 1);
      if constexpr (kIsPaced) Pace();
      ArriveExpectBytes(full, kQuarterChunks * bytes());
#pragma unroll(kIsShort ? 1 : kQuarterChunks)
      for (int c = 0; c < kQuarterChunks; ++c) {
        load(&smem_.v[v_.Stage()][c], full, quarter * kQuarterChunks + c);
      }
      v_.Advance();
    }
    if constexpr (Config::kHasRope) {
      Wait(&smem_.rope_ready.empty[rope_.Stage()], rope_.Parity() ^ 1);
      ArriveExpectBytes(&smem_.rope_ready.full[rope_.Stage()], bytes());
      load(&smem_.rope.tiles[rope_.Stage()], &smem_.rope_ready.full[rope_.Stage()], kChunks - 1);
      rope_.Advance();
    }
    if constexpr (kIsPaced) FollowProgress();
  }

  // Where memory is the limit: waits until fewer than max_in_flight_ stages of keys are in flight.
  // More would not be faster, and each block would wait longer for its next tile. (After the
  // queries of a piece some of the stages counted hold queries. That is close enough.)
  __device__ __forceinline__ void Pace() {
    for (; in_flight_ >= max_in_flight_; --in_flight_) {
      const RingCursor<kValueStages> oldest = v_.Before(in_flight_);
      Wait(&smem_.v_ready.full[oldest.Stage()], oldest.Parity());
    }
    ++in_flight_;
  }

  // Blocks that are ahead of the others leave memory bandwidth to those that are behind, so that
  // all end together. Progress is counted in the cost units of the schedule. The value compared
  // here was read one tile ago, so nobody waits for it.
  __device__ __forceinline__ void FollowProgress() {
    // By how many cost units this block is ahead of the mean, times the number of blocks.
    const int lead = static_cast<int>(fair_progress_ - progress_), blocks = params_.loading_blocks;
    if (blocks == 0) return;
    max_in_flight_ = lead > blocks ? kFewInFlight : lead < -blocks ? kManyInFlight : kInFlight;
    AddProgress(1);
    progress_ = ReadRelaxed(params_.progress);
  }
  __device__ __forceinline__ void AddProgress(int cost) {
    fair_progress_ += cost * params_.loading_blocks;
    CountRelaxed(params_.progress, cost);
  }

  // Prefetches every other chunk of a tile into the L2; the other block of the cluster prefetches
  // the rest. Which of them loads a chunk later does not matter. Does nothing if the page ids are
  // not there yet. Unrolled, because the loader's own time matters here.
  __device__ __forceinline__ void PrefetchTile(int tile, int tokens) {
    const int page = params_.table.PageOf(tile);
    if (tile >= end_ || page >= ids_end_ || IsShort(tokens)) return;
    const int box_tokens = params_.table.BoxTokens();
    const int row = params_.table.TokenInPage(tile);
    const int* id = PageIds(page);
#pragma unroll 1
    for (int j = 0; j < kTileTokens; j += box_tokens) {
#pragma unroll
      for (int c = 0; c < kChunks; c += kClusterSize) {
        const int chunk = c + (turn_ & 1);
        if (chunk < kChunks) {
          TmaPrefetch4d(&maps_.k, chunk * kChunkColumns, kv_head_, row, *id);
        }
      }
      ++id;
    }
  }

  // Whether a tile with this many tokens left is loaded in part. Pages smaller than a tile need no
  // such case: those past the end have id -1 and read nothing.
  __device__ __forceinline__ bool IsShort(int tokens) const {
    return tokens <= kTileTokens - kShortBoxTokens && params_.table.BoxTokens() == kTileTokens;
  }

  // The open page ids, from that of page `page` of the sequence on.
  __device__ __forceinline__ const int* PageIds(int page) const {
    return &smem_.keys.ids[pages_.Stage()][page - (ids_end_ - kWarpSize)];
  }

  // Opens the next stage of 32 page ids. The first is the id of page `page` of the sequence.
  __device__ __forceinline__ void OpenIds(int page) {
    Wait(&smem_.keys.ready.full[pages_.Stage()], pages_.Parity());
    ids_end_ = page + kWarpSize;
  }
  __device__ __forceinline__ void CloseIds() {
    Arrive(&smem_.keys.ready.empty[pages_.Stage()]);
    pages_.Advance();
  }

  // Loads a chunk: in one box if a page holds whole tiles, else in one box a page.
  __device__ __forceinline__ void LoadChunk(SmemTile<T>* tile, Barrier* full, int chunk,
                                            const int* ids, int row) {
    if (kClusterSize > 1 && (turn_++ & 1)) return;  // the other block loads it
    LoadBox(tile->data, maps_.k, full, chunk, first_id_, row);
    const int box_tokens = params_.table.BoxTokens();
#pragma unroll 1
    for (int j = box_tokens; j < kTileTokens; j += box_tokens) {
      LoadBox(tile->data + j * kChunkColumns, maps_.k, full, chunk, *++ids, row);
    }
  }

  // Loads the first `tokens` rows of a chunk, in boxes of kShortBoxTokens.
  __device__ __forceinline__ void LoadShortChunk(SmemTile<T>* tile, Barrier* full, int chunk,
                                                 int row, int tokens) {
    if (kClusterSize > 1 && (turn_++ & 1)) return;  // the other block loads it
#pragma unroll 1
    for (int j = 0; j < tokens; j += kShortBoxTokens) {
      LoadBox(tile->data + j * kChunkColumns, maps_.k_short, full, chunk, first_id_, row + j);
    }
  }

  __device__ __forceinline__ void LoadBox(T* destination, const CUtensorMap& map, Barrier* full,
                                          int chunk, int page_id, int row) {
    // Without a cluster no register is free for the policy: choose it again for each load.
    const bool evict_first = kClusterSize > 1 ? evict_first_ : Opaque(evict_first_);
    const CachePolicy policy = evict_first ? kEvictFirst : kEvictNormal;
    if constexpr (kClusterSize == 1) {
      TmaLoad4d(destination, &map, full, policy, chunk * kChunkColumns, kv_head_, row, page_id);
    } else {
      TmaLoadMulticast4d(destination, &map, full, policy, (1 << kClusterSize) - 1,
                         chunk * kChunkColumns, kv_head_, row, page_id);
    }
  }

  SharedMemoryPlan<Config>& smem_;
  const LoadMaps& maps_;
  const DenseParams& params_;
  bool evict_first_;  // whether keys may leave the L2 first
  const int kv_head_;
  int end_;       // the end of this piece, as a tile
  int first_id_;  // the page id of this tile, of its first page if it has several
  static constexpr bool kIsPaced = kClusterSize == 1;
  static constexpr int kFewInFlight = 3, kInFlight = 4, kManyInFlight = 6;
  int in_flight_ = 0, max_in_flight_ = kInFlight;  // stages of keys
  // progress_: cost units done by all blocks so far. fair_progress_: what it would be if every
  // block were as far as this one.
  uint32_t fair_progress_, progress_;
  uint32_t turn_ = 0;
  int ids_end_;  // the end of the open page ids, as a page of the sequence
  RingCursor<kPieceStages> piece_;
  RingCursor<kPageStages> pages_;
  RingCursor<Config::kTailStages> q_tail_;
  RingCursor<kValueStages> v_;
  RingCursor<kRopeStages> rope_;
};

}  // namespace jax_flashmla::dense_decode
